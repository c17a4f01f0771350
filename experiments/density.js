"use strict";
// Shows what both models would have said in the place of the token under the pointer. Text is set as text, never as HTML.
const {texts, responses} = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const make = (parent, name, text, className) => {
  const element = parent.appendChild(document.createElement(name));
  element.textContent = text;
  element.className = className || "";
  return element;
};
const visible = text => text.replace(/\n/g, "⏎").replace(/ /g, "␣");
const percent = p => p >= 0.0995 ? (100 * p).toFixed(0) + " %" : p >= 0.00095 ? (100 * p).toFixed(1) + " %" : (100 * p).toPrecision(1) + " %";
const show = event => {
  const token = event.target.closest(".token");
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  const {ids, logprobs, rewards, student, teacher} = responses[token.parentElement.dataset.response];
  const at = Number(token.dataset.at), reward = rewards[at];
  const times = Math.exp(Math.abs(reward));
  const factor = times < 9.5 ? times.toFixed(1) : Math.round(times).toLocaleString("en");
  const compared = times < 1.05 ? "about as often" : `${factor} times ${reward < 0 ? "less" : "as"} often`;
  tip.replaceChildren();
  const line = make(tip, "div", "", "says");
  make(line, "b", visible(texts[ids[at]]));
  const chances = [logprobs[at], logprobs[at] + reward].map(logprob => percent(Math.exp(logprob)));
  line.append(`  dense reward ${reward.toFixed(2).replace("-", "−")} nats. The student writes this with probability `
    + `${chances[0]} and the teacher with ${chances[1]}, ${compared}.`);
  const both = make(tip, "div", "", "both");
  [["the student", student], ["the teacher", teacher]].forEach(([name, model]) => {
    const column = make(both, "div", "");
    make(column, "b", name);
    model[at].forEach(([id, p]) => {
      const row = make(column, "div", "", id === ids[at] ? "row sampled" : "row");
      row.style.backgroundImage = `linear-gradient(#ffe08a, #ffe08a)`;
      row.style.backgroundSize = `${100 * p}% 100%`;
      make(row, "span", visible(texts[id]));
      make(row, "span", percent(p));
    });
  });
  const box = token.getClientRects()[0];
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  const below = box.bottom + 8;
  tip.style.top = (below + tip.offsetHeight < innerHeight ? below : Math.max(8, box.top - tip.offsetHeight - 8)) + "px";
};
document.addEventListener("mouseover", show);
document.addEventListener("click", show);
