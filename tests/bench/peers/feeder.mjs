// Forwards broadcasts from a queue to nchan's publishing location.
import http from 'node:http'
import amqp from 'amqplib'

const [url, port] = process.argv.slice(2)
const agent = new http.Agent({ keepAlive: true, maxSockets: 1 })
const connection = await amqp.connect(url)
const channel = await connection.createChannel()
await channel.assertExchange('events', 'topic', { durable: true })
await channel.prefetch(200)
const { queue } = await channel.assertQueue('', { exclusive: true, autoDelete: true })
await channel.bindQueue(queue, 'events', 'all.#')
await channel.consume(queue, (message) => {
  const text = message.content.toString()
  const event = JSON.parse(text)
  const options = { agent, port: Number(port), method: 'POST', path: '/publish', headers: { 'X-EventSource-Event': event.type } }
  http.request(options, (response) => {
    response.resume()
    channel.ack(message)
  }).end(text)
})
console.log('serving')
