// The gateway in Fastify and undici: each request makes one downstream call.
import Fastify from 'fastify';
import { Pool } from 'undici';

const downstream = new Pool(process.env.DOWNSTREAM_URL, {
  connections: Number(process.env.DOWNSTREAM_CONNECTIONS),
  headersTimeout: 5000,
  bodyTimeout: 5000,
});
const app = Fastify({ logger: false });

app.get('/api/string', {
  // A response schema lets Fastify compile the serialiser.
  schema: { response: { 200: { type: 'object', properties: { result: { type: 'string' } } } } },
  handler: async (request, reply) => {
    const { statusCode, body } = await downstream.request({ method: 'GET', path: '/api/message' });
    if (statusCode !== 200) {
      await body.dump();
      return reply.code(503).send();
    }
    return { result: (await body.json()).message };
  },
});

await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT), backlog: 4096 });
