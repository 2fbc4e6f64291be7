// Node with one queue for the process, and the fan-out in memory.
import http from 'node:http'
import amqp from 'amqplib'

const [url, port] = process.argv.slice(2)
const connection = await amqp.connect(url)
const channel = await connection.createChannel()
await channel.assertExchange('events', 'topic', { durable: true })
await channel.prefetch(2000)
const { queue } = await channel.assertQueue('', { exclusive: true, autoDelete: true })
await channel.bindQueue(queue, 'events', '#')

const everybody = new Set()
const byUser = new Map()

await channel.consume(queue, (message) => {
  const [audience, user] = message.fields.routingKey.split('.', 2)
  const responses = audience === 'all' ? everybody : byUser.get(user)
  if (responses) {
    const text = message.content.toString()
    const event = JSON.parse(text)
    const frame = Buffer.from(`id: ${event.id}\nevent: ${event.type}\ndata: ${text}\n\n`)
    for (const response of responses) response.write(frame)
  }
  channel.ack(message)
})

const server = http.createServer((request, response) => {
  const user = new URL(request.url, 'http://localhost').searchParams.get('user')
  response.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-cache' })
  const mine = byUser.get(user) ?? new Set()
  byUser.set(user, mine)
  mine.add(response)
  everybody.add(response)
  request.on('close', () => {
    everybody.delete(response)
    mine.delete(response)
    if (!mine.size) byUser.delete(user)
  })
  response.write('event: ready\ndata: {}\n\n')
})
server.listen({ port: Number(port), host: '127.0.0.1', backlog: 4096 }, () => console.log('serving'))
