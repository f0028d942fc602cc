"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const key = `prefopt-study:${data.study}:${data.rater}`;
  const element = (id) => document.getElementById(id);
  const known = new Map(data.items.map((item) => [item.id, item]));
  const words = { left: "Text 1 is better", right: "Text 2 is better", tie: "equally good", skip: "skipped" };

  // Answers in the order in which they were given; undo takes the last one back.
  let votes = [];
  let shown = null; // id of the item on the screen
  let since = 0; // when it was shown
  let spent = 0; // milliseconds on it before the page was hidden, or in an earlier visit
  let exported = true;

  function load() {
    try {
      const stored = JSON.parse(localStorage.getItem(key) || "null");
      if (stored) votes = checked(stored.votes);
    } catch (error) {
      // Storage is blocked or was altered: begin anew, and say at the end that nothing could be kept.
    }
  }

  function save() {
    try {
      localStorage.setItem(key, JSON.stringify({ votes }));
      return true;
    } catch (error) {
      return false;
    }
  }

  function checked(list) {
    const seen = new Set();
    return (Array.isArray(list) ? list : []).filter((vote) => {
      const good = vote && known.has(vote.id) && !seen.has(vote.id) && typeof vote.vote === "string"
        && Object.hasOwn(words, vote.vote) && Number.isFinite(vote.seconds) && vote.seconds >= 0;
      if (good) seen.add(vote.id);
      return good;
    }).map((vote) => ({ id: vote.id, vote: vote.vote, seconds: vote.seconds }));
  }

  function next() {
    const answered = new Set(votes.map((vote) => vote.id));
    return data.items.find((item) => !answered.has(item.id)) || null;
  }

  // What has no shape of its own (control characters, direction marks, zero widths, tags) would change how a text is
  // shown, or mark it unseen; it is shown itself. Within an emoji such characters are part of the picture.
  const picture = /\p{Extended_Pictographic}[\ufe0e\ufe0f\p{Emoji_Modifier}]?(\u200d\p{Extended_Pictographic}[\ufe0e\ufe0f\p{Emoji_Modifier}]?)*/u;
  const unseen = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Default_Ignorable_Code_Point}]/u;
  const either = new RegExp(`${picture.source}|${unseen.source}`, "gu");

  function plain(text) {
    return text.replace(/\r\n?/g, "\n").replace(either, (found) => (picture.test(found) ? found : "\ufffd"));
  }

  function page(name) {
    for (const id of ["intro", "compare", "done"]) element(id).hidden = id !== name;
    element("bar").hidden = name === "intro";
    element("export-early").hidden = name !== "compare" || votes.length === 0;
    element("count").textContent = `${votes.length} of ${data.items.length} answered`;
    element("progress").value = votes.length;
  }

  function show(status) {
    const item = next();
    element("status").textContent = status || "";
    if (!item) {
      shown = null;
      page("done");
      element("filename").textContent = filename();
      element("done-heading").focus();
      return;
    }
    page("compare");
    shown = item.id;
    spent = 0;
    since = performance.now();
    element("item-heading").textContent = `Comparison ${votes.length + 1} of ${data.items.length}`;
    element("prompt").textContent = plain(item.prompt);
    element("left").textContent = plain(item.left);
    element("right").textContent = plain(item.right);
    element("undo").disabled = votes.length === 0;
    element("prompt").scrollTop = 0;
    window.scrollTo(0, 0);
    element("item-heading").focus({ preventScroll: true });
  }

  function vote(choice) {
    if (!shown) return;
    const seconds = (spent + performance.now() - since) / 1000;
    votes.push({ id: shown, vote: choice, seconds: Math.round(seconds * 100) / 100 });
    exported = false;
    const kept = save();
    show(`Answer ${votes.length}: ${words[choice]}.${kept ? "" : " This browser keeps nothing: please do not close the page before you have exported."}`);
  }

  function undo() {
    if (votes.length === 0) return;
    votes.pop();
    save();
    show("The last answer was taken back.");
  }

  function answers() {
    return JSON.stringify({ schema: data.schema, study: data.study, rater: data.rater, complete: !next(), votes }, null, 1);
  }

  function filename() {
    return `${data.task}-${data.rater}.json`;
  }

  function download() {
    const url = URL.createObjectURL(new Blob([answers()], { type: "application/json" }));
    const link = document.createElement("a");
    link.href = url;
    link.download = filename();
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    exported = true;
    element("status").textContent = `Exported ${votes.length} answers as ${filename()}.`;
  }

  async function copy() {
    try {
      await navigator.clipboard.writeText(answers());
      exported = true;
      element("status").textContent = `Copied ${votes.length} answers.`;
    } catch (error) {
      element("status").textContent = "This browser does not let the page copy: please export instead.";
    }
  }

  async function restore(file) {
    const notice = element("notice");
    try {
      const given = JSON.parse(await file.text());
      if (given.study !== data.study || given.rater !== data.rater || given.schema !== data.schema) {
        notice.textContent = "That file belongs to another study or another rater; nothing was changed.";
        return;
      }
      votes = checked(given.votes);
      save();
      notice.textContent = `${votes.length} answers were read. Start goes on after them.`;
      element("start").textContent = "Go on";
    } catch (error) {
      notice.textContent = "That file cannot be read as exported answers; nothing was changed.";
    }
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) spent += performance.now() - since;
    else since = performance.now();
  });
  window.addEventListener("beforeunload", (event) => {
    if (!exported && votes.length > 0 && !save()) event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || !element("shortcuts").checked) return;
    if (event.target instanceof HTMLInputElement || !element("intro").hidden) return;
    const choice = { 1: "left", 2: "right", 0: "tie", s: "skip", S: "skip" }[event.key];
    if (choice && shown) vote(choice);
    else if (event.key === "u" || event.key === "U") undo();
    else return;
    event.preventDefault();
  });
  for (const button of document.querySelectorAll("[data-vote]")) button.addEventListener("click", () => vote(button.dataset.vote));
  element("undo").addEventListener("click", undo);
  element("undo-last").addEventListener("click", undo);
  element("export").addEventListener("click", download);
  element("export-early").addEventListener("click", download);
  element("copy").addEventListener("click", copy);
  element("import").addEventListener("change", (event) => event.target.files[0] && restore(event.target.files[0]));
  element("start").addEventListener("click", () => show(""));

  load();
  if (votes.length > 0) {
    element("start").textContent = "Go on";
    element("notice").textContent = `${votes.length} of ${data.items.length} answers are kept in this browser. Go on where you stopped.`;
  }
  element("start").focus();
})();
