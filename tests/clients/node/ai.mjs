// The package "ai", with its provider of compatible servers, against the server at LFM2_FAST_URL.

import assert from "node:assert/strict";
import test from "node:test";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, isStepCount, Output, streamText, tool } from "ai";
import { z } from "zod";

const ANSWER = "Hello! Ask me about Python or PostgreSQL.";
const TRIP = z.object({ city: z.enum(["Rome", "Oslo"]), days: z.enum(["one", "two"]) });
const provider = createOpenAICompatible({
  name: "lfm2",
  baseURL: `${process.env.LFM2_FAST_URL}/v1`,
  apiKey: "secret",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("tiny");

test("a text, whole and streamed", async () => {
  const whole = await generateText({ model, prompt: "Hello!" });
  assert.equal(whole.text, ANSWER);
  assert.equal(whole.finishReason, "stop");
  const stream = streamText({ model, prompt: "Hello!" });
  let said = "";
  for await (const piece of stream.textStream) said += piece;
  assert.equal(said, ANSWER);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
});

test("an object of a schema", async () => {
  const made = await generateText({
    model,
    prompt: "Where to?",
    maxOutputTokens: 80,
    output: Output.object({ schema: TRIP }),
  });
  TRIP.parse(made.output);
});

test("a tool is called with what its schema allows, and the conversation goes on", async () => {
  const asked = [];
  const book = tool({
    description: "Book a trip.",
    inputSchema: TRIP,
    execute: async (trip) => {
      asked.push(TRIP.parse(trip));
      return "Done.";
    },
  });
  for (const ask of [generateText, streamText]) {
    const made = ask({
      model,
      prompt: "Book a trip.",
      maxOutputTokens: 60,
      tools: { book },
      toolChoice: "required",
      stopWhen: isStepCount(2),
    });
    const steps = await (ask === streamText ? (await made.consumeStream(), made.steps) : (await made).steps);
    assert.equal(steps.length, 2);
    assert.equal(steps[0].finishReason, "tool-calls");
  }
  assert.ok(asked.length >= 2);
});
