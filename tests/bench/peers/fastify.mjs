// Fastify as its users use it: the plugin for Server-Sent Events, and amqplib with a queue for each connection.
import amqp from 'amqplib'
import Fastify from 'fastify'
import { FastifySSEPlugin } from 'fastify-sse-v2'

const [url, port] = process.argv.slice(2)
const connection = await amqp.connect(url)
const channel = await connection.createChannel()
await channel.assertExchange('events', 'topic', { durable: true })
await channel.prefetch(200)

const app = Fastify()
app.register(FastifySSEPlugin)
app.get('/events', async (request, reply) => {
  const { user } = request.query
  const { queue } = await channel.assertQueue('', { exclusive: true, autoDelete: true })
  await channel.bindQueue(queue, 'events', `user.${user}.#`)
  await channel.bindQueue(queue, 'events', 'all.#')
  reply.sse({ event: 'ready', data: '{}' })
  const { consumerTag } = await channel.consume(queue, (message) => {
    const text = message.content.toString()
    const event = JSON.parse(text)
    reply.sse({ id: event.id, event: event.type, data: text })
    channel.ack(message)
  })
  request.raw.on('close', () => channel.cancel(consumerTag))
})
await app.listen({ port: Number(port), host: '127.0.0.1', backlog: 4096 })
console.log('serving')
