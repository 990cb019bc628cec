/**
 * NextState's plugin for OpenClaw: it names the session and the kind of each turn, and sends what a person says of a reply.
 *
 * OpenClaw loads it as it is: there is nothing to build and nothing to install beside it.
 */

const PROVIDER = "nextstate";
const ANSWERS_WITHIN_MS = 10_000;
/** What is remembered of this many runs and sessions; the oldest is forgotten first. */
const MOST_REMEMBERED = 1000;

/** The kind of a turn by what started its run. Of anything else, NextState finds out by itself. */
const KINDS = {
  user: "main",
  cron: "main",
  heartbeat: "side",
  memory: "side",
  manual: "side", // a compaction that a person asked for
  overflow: "side", // a compaction because the context was full
};

/** @type {Map<string, string>} The kind of each run's turns. */
const kinds = new Map();
/** @type {Map<string, string>} NextState's id of the last turn that ended in an answer, by session. */
const answers = new Map();

/** @param {Map<string, string>} map @param {string} key @param {string} value */
function remember(map, key, value) {
  map.delete(key);
  map.set(key, value);
  if (map.size > MOST_REMEMBERED) map.delete(/** @type {string} */ (map.keys().next().value));
}

/**
 * A stream function whose requests say which session and which kind of turn they are.
 *
 * @typedef {NonNullable<import("openclaw/plugin-sdk/plugin-entry").ProviderWrapStreamFnContext["streamFn"]>} StreamFn
 * @param {StreamFn | undefined} streamFn
 * @returns {StreamFn | undefined}
 */
function telling(streamFn) {
  if (!streamFn) return undefined;
  return async (model, context, options) => {
    const session = options?.sessionId;
    const run = options?.requestId?.replace(/:model:\d+$/, "");
    const kind = run && kinds.get(run);
    let turn = "";
    const stream = await streamFn(model, context, {
      ...options,
      headers: {
        ...options?.headers,
        ...(session && { "X-Session-Id": session }),
        ...(kind && { "X-Turn-Type": kind }),
      },
      onResponse: async (response, from) => {
        turn = response.headers["x-nextstate-turn"] ?? "";
        await options?.onResponse?.(response, from);
      },
    });
    if (session && kind !== "side") {
      stream.result().then(
        (reply) => {
          const answered = reply.stopReason === "stop" || reply.stopReason === "length";
          if (answered && turn) remember(answers, session, turn);
        },
        () => {}, // OpenClaw reads the same error from the stream
      );
    }
    return stream;
  };
}

/**
 * Titles and other short requests of OpenClaw's own.
 *
 * @param {StreamFn | undefined} streamFn
 * @returns {StreamFn | undefined}
 */
function aside(streamFn) {
  if (!streamFn) return undefined;
  return (model, context, options) =>
    streamFn(model, context, {
      ...options,
      headers: { ...options?.headers, "X-Turn-Type": "side" },
    });
}

/**
 * Sends what a person says of the last answer in a session. Returns what to tell the person.
 *
 * @param {import("openclaw/plugin-sdk/plugin-entry").OpenClawPluginApi} api
 * @param {import("openclaw/plugin-sdk/plugin-entry").PluginCommandContext} ctx
 * @param {{ score: number, hint?: string, comment?: string }} said
 */
async function sendFeedback(api, ctx, said) {
  const baseUrl = ctx.config.models?.providers?.[PROVIDER]?.baseUrl;
  if (!baseUrl) return `No provider ${PROVIDER} is configured: run \`nextstate connect openclaw\`.`;
  if (!ctx.sessionId) return "There is no reply in this conversation yet.";
  const turn = answers.get(ctx.sessionId);
  const about = turn ? { turn_id: turn } : { session_id: ctx.sessionId };
  const auth = await api.runtime.modelAuth.resolveApiKeyForProvider({
    provider: PROVIDER,
    cfg: ctx.config,
  });
  let answer;
  try {
    answer = await fetch(`${baseUrl.replace(/\/+$/, "")}/feedback`, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        ...(auth.apiKey && { Authorization: `Bearer ${auth.apiKey}` }),
      },
      body: JSON.stringify({ ...about, ...said }),
      signal: AbortSignal.timeout(ANSWERS_WITHIN_MS),
    });
  } catch {
    return `NextState does not answer at ${baseUrl}: is it running? (\`nextstate status\`)`;
  }
  const told = /** @type {any} */ (await answer.json().catch(() => ({})));
  if (answer.status === 404) return "NextState has no reply of this conversation.";
  if (!answer.ok) return `NextState refused it: ${told.error?.message ?? answer.status}`;
  if (!told.applied) return `Noted, but the reply does not train with it: ${told.reason}.`;
  return said.score > 0 ? "Noted: that reply was good." : "Noted: that reply was bad.";
}

export default {
  id: PROVIDER,
  name: "NextState",
  description: "Names the session and the kind of each turn; /good and /bad rate a reply.",
  /** @param {import("openclaw/plugin-sdk/plugin-entry").OpenClawPluginApi} api */
  register(api) {
    api.registerProvider({
      id: PROVIDER,
      label: "NextState",
      auth: [],
      wrapStreamFn: (ctx) => telling(ctx.streamFn),
      wrapSimpleCompletionStreamFn: (ctx) => aside(ctx.streamFn),
    });
    api.on("before_model_resolve", (_event, ctx) => {
      const kind = KINDS[/** @type {keyof typeof KINDS} */ (ctx.trigger)];
      if (ctx.runId && kind) remember(kinds, ctx.runId, kind);
    });
    api.registerCommand({
      name: "good",
      description: "Tell NextState that the last reply was good",
      acceptsArgs: true,
      handler: async (ctx) => ({
        text: await sendFeedback(api, ctx, { score: 1, comment: ctx.args }),
      }),
    });
    api.registerCommand({
      name: "bad",
      description: "Tell NextState that the last reply was bad: /bad what it should have done",
      acceptsArgs: true,
      handler: async (ctx) => ({
        text: await sendFeedback(api, ctx, { score: -1, hint: ctx.args }),
      }),
    });
  },
};
