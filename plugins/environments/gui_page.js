// Runs in a page of MiniWoB++: begins an episode, does one action, and lists what is visible.
async ({ start, act, most }) => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const SKIPPED = new Set(["query", "reward-display", "sync-task-cover", "click-canvas"]);
  const SILENT = new Set(["SCRIPT", "STYLE", "TEMPLATE", "NOSCRIPT", "OPTION"]);
  const CONTROLS = "a, button, input, select, textarea, summary, [onclick], [role=button], [role=tab]";
  const BUTTONS = new Set(["button", "submit", "reset", "image"]);
  const VISIBLE = { visibilityProperty: true, opacityProperty: true };

  // A word is held out by its letters alone, so it is in the same split in every list and page.
  const isHeldOut = (word) => {
    let hash = 0;
    for (const letter of String(word).toLowerCase().replace(/[^a-z]/g, ""))
      hash = (hash * 31 + letter.charCodeAt(0)) >>> 0;
    return hash % 4 === 0;
  };

  const begin = async ({ seed, words }) => {
    core.EPISODE_MAX_TIME = 86400000; // ms: the runner has the deadline
    for (const list of Object.values(window.ui_utils ?? {}))
      if (words && Array.isArray(list) && list.length >= 20)
        list.splice(0, list.length, ...list.filter((w) => isHeldOut(w) === (words === "eval")));
    Math.seedrandom(seed);
    core.startEpisodeReal();
    clearInterval(core.CD_TIMER); // a countdown that nobody sees: 2.6 % of a core for each page
    for (let tries = 0; tries < 100 && !WOB_TASK_READY; tries++) await pause(50);
  };

  const fire = (element, Kind, ...names) => {
    for (const name of names)
      element.dispatchEvent(new Kind(name, { bubbles: true, cancelable: true }));
  };

  // Undefined, or what is wrong with the action.
  const perform = ({ verb, number, text }) => {
    const element = (window.nextstateShown ?? [])[number - 1];
    if (!element?.isConnected || !element.checkVisibility(VISIBLE)) return "there is no such element";
    if (element.disabled) return "it is disabled";
    if (verb === "click") {
      fire(element, MouseEvent, "mouseover", "mousedown");
      element.focus();
      fire(element, MouseEvent, "mouseup");
      element.click();
    } else if (verb === "type") {
      if (!["input", "password"].includes(kindOf(element))) return "nothing can be typed into it";
      element.focus();
      element.value = text;
      fire(element, Event, "input", "change");
      fire(element, KeyboardEvent, "keyup");
    } else {
      if (element.tagName !== "SELECT") return "it is no list";
      const option = [...element.options].find((one) => clean(one.text, 1000) === text);
      if (!option) return "it has no such option";
      option.selected = true;
      fire(element, Event, "input", "change");
    }
  };

  const clean = (text, length) =>
    String(text ?? "").slice(0, 4 * length).replace(/\s+/g, " ").trim().slice(0, length);

  const kindOf = (element) => {
    if (element.tagName === "SELECT") return "list";
    if (element.tagName === "TEXTAREA") return "input";
    if (element.tagName === "A") return "link";
    if (element.tagName !== "INPUT")
      return element.tagName === "BUTTON" ? "button" : element.getAttribute("role") || "item";
    if (BUTTONS.has(element.type)) return "button";
    return ["checkbox", "radio", "password"].includes(element.type) ? element.type : "input";
  };

  const nameOf = (element, kind) =>
    element.getAttribute("aria-label") || element.labels?.[0]?.textContent ||
    (element.tagName === "INPUT" ? kind === "button" && element.value
      : !["list", "input"].includes(kind) && element.textContent) ||
    element.getAttribute("placeholder") || element.getAttribute("title") || "";

  const describe = (element) => {
    const kind = kindOf(element);
    const line = { kind: clean(kind, 20), name: clean(nameOf(element, kind), most.chars) };
    if (["input", "password"].includes(kind)) line.value = clean(element.value, most.chars);
    if (["checkbox", "radio"].includes(kind)) line.on = element.checked;
    if (kind === "list") {
      line.value = clean(element.selectedOptions[0]?.text, most.chars);
      line.options = [...element.options].slice(0, most.options).map((o) => clean(o.text, most.chars));
    }
    return line;
  };

  const list = () => {
    const lines = [], shown = [];
    let left = most.nodes;
    const isControl = (element) =>
      element.matches(CONTROLS) || getComputedStyle(element).cursor === "pointer";
    const walk = (parent, depth) => {
      const isLabel = parent.tagName === "LABEL" && parent.control;
      for (const node of parent.childNodes) {
        if (left-- <= 0 || lines.length >= most.lines || depth > 100) return;
        if (node.nodeType === Node.TEXT_NODE && !isLabel) {
          const text = clean(node.data, most.chars), last = lines.at(-1);
          if (text && last?.kind === "text") last.name = clean(`${last.name} ${text}`, most.chars);
          else if (text) lines.push({ kind: "text", name: text });
        }
        if (node.nodeType !== Node.ELEMENT_NODE || SILENT.has(node.tagName)) continue;
        if (SKIPPED.has(node.id) || !node.checkVisibility(VISIBLE)) continue;
        if (node.type !== "hidden" && node.tagName !== "LABEL" && isControl(node)) {
          shown.push(node);
          lines.push({ ...describe(node), number: shown.length });
        } else walk(node, depth + 1);
      }
    };
    walk(document.body, 0);
    window.nextstateShown = shown;
    return { lines, more: left < 0 || lines.length >= most.lines };
  };

  if (start) await begin(start);
  const error = act && perform(act);
  await pause(0); // what the page does after its own events
  return {
    error, done: WOB_DONE_GLOBAL, reward: WOB_RAW_REWARD_GLOBAL,
    query: clean(document.getElementById("query")?.textContent, most.query), ...list(),
  };
}
