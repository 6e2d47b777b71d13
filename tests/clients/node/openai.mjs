// OpenAI's client for Node, against the server at LFM2_FAST_URL.

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";

const URL = process.env.LFM2_FAST_URL;
const HELLO = [{ role: "user", content: "Hello!" }];
const ANSWER = "Hello! Ask me about Python or PostgreSQL.";
const SCHEMA = {
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] }, days: { enum: [1, 2, 3] } },
  required: ["city", "days"],
  additionalProperties: false,
};
const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "secret", maxRetries: 0 });

function isTrip(text) {
  const { city, days } = JSON.parse(text);
  return ["Rome", "Oslo"].includes(city) && [1, 2, 3].includes(days);
}

test("a chat, whole and streamed", async () => {
  const fields = { model: "tiny", messages: HELLO };
  const whole = await client.chat.completions.create(fields);
  assert.equal(whole.choices[0].message.content, ANSWER);
  const runner = client.chat.completions.stream({
    ...fields,
    stream_options: { include_usage: true },
  });
  let said = "";
  runner.on("content", (delta) => (said += delta));
  const final = await runner.finalChatCompletion();
  assert.equal(said, ANSWER);
  assert.equal(final.choices[0].finish_reason, "stop");
  assert.equal(final.usage.completion_tokens, whole.usage.completion_tokens);
});

test("a stream that is left frees its row", async () => {
  const stream = await client.completions.create({
    model: "tiny",
    prompt: "To create a new table,",
    max_tokens: 1500,
    ignore_eos: true,
    stream: true,
  });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "text_completion");
    break;
  }
  for (let running = 1; running; ) {
    const slots = await fetch(`${URL}/slots`, { headers: { Authorization: "Bearer secret" } });
    running = (await slots.json()).filter((slot) => slot.is_processing).length;
  }
});

test("a JSON schema and a named tool", async () => {
  const fields = { model: "tiny", messages: HELLO, max_tokens: 80 };
  const format = { type: "json_schema", json_schema: { name: "trip", schema: SCHEMA, strict: true } };
  const made = await client.chat.completions.create({ ...fields, response_format: format });
  assert.ok(isTrip(made.choices[0].message.content));
  const called = await client.chat.completions.create({
    ...fields,
    tools: [{ type: "function", function: { name: "book", parameters: SCHEMA } }],
    tool_choice: { type: "function", function: { name: "book" } },
    parallel_tool_calls: false,
  });
  assert.equal(called.choices[0].finish_reason, "tool_calls");
  const [call] = called.choices[0].message.tool_calls;
  assert.ok(call.function.name === "book" && isTrip(call.function.arguments));
});

test("responses, whole and streamed", async () => {
  const whole = await client.responses.create({ model: "tiny", input: "Hello!" });
  assert.equal(whole.output_text, ANSWER);
  const stream = client.responses.stream({ model: "tiny", input: "Hello!" });
  let said = "";
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") said += event.delta;
  }
  assert.equal(said, ANSWER);
  assert.equal((await stream.finalResponse()).status, "completed");
});

test("errors are of their classes", async () => {
  const long = client.completions.create({ model: "tiny", prompt: "a ".repeat(5000) });
  await assert.rejects(long, (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.code, "context_length_exceeded");
    return true;
  });
  const stranger = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});
