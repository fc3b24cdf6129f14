// The message service in Fastify and pg: each request makes one query, prepared once a connection.
import Fastify from 'fastify';
import pg from 'pg';

const pool = new pg.Pool({
  host: process.env.DB_HOST,
  port: Number(process.env.DB_PORT),
  user: process.env.DB_USER,
  database: process.env.DB_NAME,
  max: Number(process.env.DB_POOL_SIZE),
});
const app = Fastify({ logger: false });
// A name makes pg prepare the query.
const query = { name: 'message', text: 'SELECT content FROM messages ORDER BY id LIMIT 1' };

app.get('/api/message', {
  schema: { response: { 200: { type: 'object', properties: { message: { type: 'string' } } } } },
  handler: async (request, reply) => {
    const { rows } = await pool.query(query);
    if (rows.length === 0) return reply.code(404).send();
    return { message: rows[0].content };
  },
});

await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT), backlog: 4096 });
