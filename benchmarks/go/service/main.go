// The message service in net/http and pgx: each request makes one query, prepared by pgx once a connection. With
// SINGLE_FLIGHT, it shares one that is under way.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/singleflight"
)

func main() {
	size := os.Getenv("DB_POOL_SIZE")
	pool, err := pgxpool.New(context.Background(), fmt.Sprintf(
		"host=%s port=%s user=%s dbname=%s pool_min_conns=%s pool_max_conns=%s",
		os.Getenv("DB_HOST"), os.Getenv("DB_PORT"), os.Getenv("DB_USER"), os.Getenv("DB_NAME"), size, size,
	))
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()

	var queries singleflight.Group
	message := func(ctx context.Context) (string, error) { return query(ctx, pool) }
	if os.Getenv("SINGLE_FLIGHT") != "" {
		message = func(context.Context) (string, error) {
			shared, err, _ := queries.Do("", func() (any, error) { return query(context.Background(), pool) })
			if err != nil {
				return "", err
			}
			return shared.(string), nil
		}
	}

	http.HandleFunc("GET /api/message", func(w http.ResponseWriter, r *http.Request) {
		message, err := message(r.Context())
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			http.NotFound(w, r)
			return
		case err != nil:
			http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(struct {
			Message string `json:"message"`
		}{message})
	})
	log.Fatal(http.ListenAndServe(net.JoinHostPort("127.0.0.1", os.Getenv("PORT")), nil))
}

func query(ctx context.Context, pool *pgxpool.Pool) (message string, err error) {
	err = pool.QueryRow(ctx, "SELECT content FROM messages ORDER BY id LIMIT 1").Scan(&message)
	return
}
