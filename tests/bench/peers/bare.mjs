// A minimal program: Node's own http and amqplib, an exclusive queue for each connection.
import http from 'node:http'
import amqp from 'amqplib'

const [url, port] = process.argv.slice(2)
const connection = await amqp.connect(url)
const channel = await connection.createChannel()
await channel.assertExchange('events', 'topic', { durable: true })
await channel.prefetch(200)

const server = http.createServer(async (request, response) => {
  const user = new URL(request.url, 'http://localhost').searchParams.get('user')
  response.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-cache' })
  const { queue } = await channel.assertQueue('', { exclusive: true, autoDelete: true })
  await channel.bindQueue(queue, 'events', `user.${user}.#`)
  await channel.bindQueue(queue, 'events', 'all.#')
  const { consumerTag } = await channel.consume(queue, (message) => {
    const text = message.content.toString()
    const event = JSON.parse(text)
    response.write(`id: ${event.id}\nevent: ${event.type}\ndata: ${text}\n\n`)
    channel.ack(message)
  })
  request.on('close', () => channel.cancel(consumerTag))
  response.write('event: ready\ndata: {}\n\n')
})
server.listen({ port: Number(port), host: '127.0.0.1', backlog: 4096 }, () => console.log('serving'))
