// The page keeps the conversation; each question is one request to the server's own API (docs/serving.md).

const $ = (id) => document.getElementById(id);
const BOX = /\[\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*\]/g; // as geometry.parse_boxes

let key = sessionStorage.getItem("key") ?? "";
let info = null; // the answer of /ui/info without a picture
let picture = null; // {url, budgets}: the file as a data: URL, and its cost at each budget
let turns = []; // finished turns: {question, answer}
let running = null; // AbortController of the question that is being answered

// --- Server ---------------------------------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  // Headers hold bytes; the server reads the key as UTF-8.
  if (key) headers.Authorization = "Bearer " + String.fromCharCode(...new TextEncoder().encode(key));
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  if (response.status === 401) {
    askForKey();
    throw new Error(); // without a message, because the form has one
  }
  throw new Error(body?.error?.message ?? `The server answered with status ${response.status}.`);
}

function askForKey() {
  $("key-form").querySelector("label").textContent = key ? "The key is wrong. Try again." : "This server needs a key.";
  sessionStorage.removeItem("key");
  key = "";
  $("key-form").hidden = false;
  $("key").focus();
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke before the end of the answer.");
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function start() {
  try {
    info = await (await call("info")).json();
  } catch (error) {
    return showError(error);
  }
  showError(null);
  $("key-form").hidden = true;
  if (key) sessionStorage.setItem("key", key);
  $("model").textContent = info.model;
  $("examples").replaceChildren(...info.examples.map(exampleCard));
}

// --- Picture --------------------------------------------------------------------------------------------------------

async function showPicture(file) {
  try {
    if (!info) throw new Error("The page is not connected to the server yet.");
    const mebibytes = (bytes) => (bytes / 2 ** 20).toFixed(1) + " MiB";
    if (file.size > info.max_file_bytes) {
      throw new Error(`The picture has ${mebibytes(file.size)}; the limit is ${mebibytes(info.max_file_bytes)}.`);
    }
    const url = await new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(new Error("The file cannot be read."));
      reader.readAsDataURL(file);
    });
    const image = new Image();
    image.src = url;
    await image.decode().catch(() => {
      throw new Error("The file is not a picture, or it is damaged.");
    });
    const response = await call(`info?width=${image.naturalWidth}&height=${image.naturalHeight}`);
    picture = { url, budgets: (await response.json()).budgets };
  } catch (error) {
    showError(error);
    return false;
  }
  showError(null);
  $("picture").src = picture.url;
  $("frame").hidden = false;
  $("hint").hidden = true;
  $("drop").classList.remove("empty");
  $("budget").disabled = false;
  $("budget").max = picture.budgets.length - 1;
  $("budget").value = $("budget").max;
  showCost();
  clearConversation();
  $("question").focus();
  return true;
}

const budget = () => picture.budgets[$("budget").value];

function showCost() {
  const { side, canvas, visual_tokens: tokens, tower_flops: flops } = budget();
  const share = flops / picture.budgets.at(-1).tower_flops;
  $("side").textContent = `${side} × ${side}`;
  $("budget").setAttribute("aria-valuetext", $("side").textContent);
  $("cost").textContent =
    `Seen as ${canvas.join(" × ")} pixels: ${tokens} visual tokens, ${(flops / 1e9).toFixed(1)} GFLOP in the tower` +
    (budget().max_pixels ? `, ${Math.round(100 * share)} % of the whole budget.` : ".");
}

// Boxes are fractions of the canvas that the model saw; margins and cuts of the canvas are taken out.
function drawBoxes(answer, [left, top, width, height]) {
  const within = (value) => Math.min(1, Math.max(0, value));
  const rectangles = [...answer.matchAll(BOX)].map((found) => {
    const [x0, y0, x1, y1] = found.slice(1).map(Number);
    const xs = [x0, x1].map((x) => within((x - left) / width)).sort((a, b) => a - b);
    const ys = [y0, y1].map((y) => within((y - top) / height)).sort((a, b) => a - b);
    const rectangle = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const place = { x: xs[0], y: ys[0], width: xs[1] - xs[0], height: ys[1] - ys[0] };
    Object.entries(place).forEach(([name, value]) => rectangle.setAttribute(name, value));
    return rectangle;
  });
  $("boxes").replaceChildren(...rectangles);
}

// --- Conversation ---------------------------------------------------------------------------------------------------

async function ask(question) {
  if (running) return;
  if (!picture) return showError(new Error("There is no picture yet. Choose one first."));
  showError(null);
  const { max_pixels, image: placement, canvas } = budget();
  const texts = [...turns.flatMap((turn) => [turn.question, turn.answer]), question];
  const messages = texts.map((content, index) => ({ role: index % 2 ? "assistant" : "user", content }));
  messages[0].content = [
    { type: "image_url", image_url: { url: picture.url } },
    { type: "text", text: texts[0] },
  ];
  const body = { model: info.model, messages, stream: true, stream_options: { include_usage: true } };
  if (max_pixels) body.mm_processor_kwargs = { max_pixels };

  const asked = addMessage("asked", question);
  const shown = addMessage("answer", "");
  $("question").value = "";
  $("facts").textContent = "";
  drawBoxes("", placement);
  setRunning(new AbortController());
  const { signal } = running;
  const started = performance.now();
  const seconds = () => ((performance.now() - started) / 1000).toFixed(2) + " s";
  let answer = "";
  let first = null;
  try {
    const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
    for await (const { choices, usage } of events(response)) {
      if (signal.aborted) throw new DOMException("", "AbortError");
      const piece = choices[0]?.delta.content;
      if (piece) {
        first ??= seconds();
        answer += piece;
        shown.textContent = answer;
        drawBoxes(answer, placement);
        $("log").scrollTop = $("log").scrollHeight;
      }
      if (usage) {
        const visual = usage.prompt_tokens_details.image_tokens;
        $("facts").textContent = [
          `${canvas.join(" × ")} pixels`,
          `${usage.prompt_tokens} prompt tokens (${visual} visual)`,
          `first token ${first ?? seconds()}`,
          `${usage.completion_tokens} tokens in ${seconds()}`,
        ].join(" · ");
      }
    }
  } catch (error) {
    if (!asked.isConnected) return; // the conversation was cleared meanwhile
    if (error.name === "AbortError") $("facts").textContent = `Stopped after ${seconds()}.`;
    else showError(error);
  }
  setRunning(null);
  if (answer) {
    turns.push({ question, answer });
  } else {
    asked.remove();
    shown.remove();
    if (!$("question").value) $("question").value = question;
  }
  $("clear").disabled = !turns.length;
  $("empty").hidden = turns.length > 0;
}

function addMessage(kind, text) {
  const message = document.createElement("p");
  message.className = kind;
  message.textContent = text;
  $("empty").hidden = true;
  $("log").append(message);
  $("log").scrollTop = $("log").scrollHeight;
  return message;
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("log").setAttribute("aria-busy", Boolean(running)); // a screen reader waits for the whole answer
}

function clearConversation() {
  running?.abort();
  setRunning(null);
  turns = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("boxes").replaceChildren();
  $("facts").textContent = "";
  $("clear").disabled = true;
}

function showError(error) {
  $("error").textContent = error?.message ?? "";
  $("error").hidden = !$("error").textContent;
}

// --- Examples -------------------------------------------------------------------------------------------------------

function exampleCard({ image, questions }) {
  const card = document.createElement("div");
  card.className = "example card";
  const thumbnail = new Image();
  thumbnail.src = image;
  thumbnail.alt = "";
  const buttons = document.createElement("div");
  buttons.append(
    ...questions.map((question) => {
      const button = document.createElement("button");
      button.textContent = question;
      button.onclick = async () => {
        if (picture?.example !== image) {
          const file = await (await fetch(image)).blob();
          if (!(await showPicture(file))) return;
          picture.example = image;
        }
        ask(question);
      };
      return button;
    }),
  );
  card.append(thumbnail, buttons);
  return card;
}

// --- Events ---------------------------------------------------------------------------------------------------------

$("file").onchange = () => {
  const [file] = $("file").files;
  if (file) showPicture(file);
  $("file").value = ""; // so that the same file can be chosen again
};
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    const file = event.dataTransfer?.files[0];
    if (name === "drop" && file) showPicture(file);
  });
}
addEventListener("paste", (event) => {
  const file = event.clipboardData.files[0];
  if (file) showPicture(file);
});
$("budget").oninput = showCost;
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask-form").requestSubmit();
  }
};
$("ask-form").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (question) ask(question);
};
$("stop").onclick = () => running?.abort();
addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("clear").onclick = () => {
  clearConversation();
  $("question").focus();
};
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key").value = "";
  start();
};

$("drop").classList.add("empty");
start();
