// The gateway in net/http: each request makes one downstream call. With SINGLE_FLIGHT, it shares one that is under way.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"golang.org/x/sync/singleflight"
)

func main() {
	connections, err := strconv.Atoi(os.Getenv("DOWNSTREAM_CONNECTIONS"))
	if err != nil {
		log.Fatal("DOWNSTREAM_CONNECTIONS: ", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxConnsPerHost = connections
	transport.MaxIdleConnsPerHost = connections // by default 2 are kept, and the others opened anew each time
	client := &http.Client{Transport: transport, Timeout: 5 * time.Second}
	url := os.Getenv("DOWNSTREAM_URL") + "/api/message"

	var calls singleflight.Group
	message := func(ctx context.Context) (string, error) { return ask(ctx, client, url) }
	if os.Getenv("SINGLE_FLIGHT") != "" {
		message = func(context.Context) (string, error) {
			// Not the request's context: the others would fail when the first client leaves.
			shared, err, _ := calls.Do(url, func() (any, error) { return ask(context.Background(), client, url) })
			if err != nil {
				return "", err
			}
			return shared.(string), nil
		}
	}

	http.HandleFunc("GET /api/string", func(w http.ResponseWriter, r *http.Request) {
		message, err := message(r.Context())
		if err != nil {
			http.Error(w, http.StatusText(http.StatusServiceUnavailable), http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(struct {
			Result string `json:"result"`
		}{message})
	})
	log.Fatal(http.ListenAndServe(net.JoinHostPort("127.0.0.1", os.Getenv("PORT")), nil))
}

func ask(ctx context.Context, client *http.Client, url string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("the message service answers %s", response.Status)
	}
	var body struct {
		Message string `json:"message"`
	}
	err = json.NewDecoder(response.Body).Decode(&body)
	return body.Message, err
}
