"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const key = (text) => text.trim().toLowerCase().replaceAll(" ", "_");
  const box = $("q");
  const cards = [...document.querySelectorAll(".cards > li")];
  const known = cards.map((card) => {
    const fields = new Map();
    for (const row of card.querySelectorAll(".fields > div")) {
      fields.set(key(row.firstElementChild.textContent), row.lastElementChild.textContent);
    }
    for (const line of (card.dataset.fields ?? "").split("\n")) {
      const at = line.indexOf("=");
      if (at > 0) fields.set(key(line.slice(0, at)), line.slice(at + 1));
    }
    const texts = [...card.querySelectorAll(".prompt")].map((node) => node.textContent);
    return { fields, text: [...texts, fields.get("negative_prompt") ?? ""].join("\n").toLowerCase() };
  });
  const names = [...new Set(known.flatMap(({ fields }) => [...fields.keys()]))];

  // ---- the filter: words of prompts, and FIELD:VALUE, FIELD=VALUE, FIELD<NUMBER, FIELD>NUMBER ----

  function parsed(text) {
    return (text.match(/[^\s"]*"[^"]*"?|\S+/g) ?? []).map((token) => {
      const [, field, sign, quoted] = /^([^:=<>"]+)([:=<>])(.+)$/.exec(token) ?? [];
      const name = field && (names.find((one) => one === key(field)) ?? names.find((one) => one.startsWith(key(field))));
      const plain = (part) => part.replaceAll('"', "").toLowerCase();
      return name ? { token, name, sign, value: plain(quoted) } : { token, value: plain(token) };
    });
  }

  function fits({ fields, text }, { name, sign, value }) {
    if (!name) return text.includes(value);
    const own = fields.get(name)?.toLowerCase();
    if (own === undefined) return false;
    const [one, other] = [Number(own), Number(value)];
    if (sign === "<" || sign === ">") return sign === "<" ? one < other : one > other;
    if (own.trim() && !Number.isNaN(one) && !Number.isNaN(other)) return one === other;
    return sign === "=" ? own === value : own.includes(value);
  }

  // What is sought stands in the address (#q=…), so that it survives a reload and goes along to the next page.
  function filter() {
    const tokens = parsed(box.value);
    let shown = 0;
    cards.forEach((card, i) => {
      card.hidden = !tokens.every((token) => fits(known[i], token));
      shown += card.hidden ? 0 : 1;
    });
    $("found").textContent = tokens.length ? `${shown} of ${cards.length} on this page` : "";
    for (const link of document.querySelectorAll("a.along")) {
      link.hash = tokens.length ? "q=" + encodeURIComponent(box.value) : "";
    }
    for (const menu of document.querySelectorAll(".filter select")) {
      const set = tokens.find(({ name, sign }) => name === menu.name && sign !== "<" && sign !== ">");
      menu.value = [...menu.options].find((option) => option.value.toLowerCase() === set?.value)?.value ?? "";
      menu.classList.toggle("set", menu.value !== "");
    }
  }

  function seek(text) {
    box.value = text;
    filter();
    try { history.replaceState(null, "", "#q=" + encodeURIComponent(text)); } catch { /* too often */ }
  }

  function addMenus() {
    for (const name of names) {
      const values = [...new Set(known.flatMap(({ fields }) => fields.get(name) ?? []))];
      if (values.length < 2 || values.length > 20 || values.length === cards.length) continue;
      values.sort((one, other) => one.localeCompare(other, "en", { numeric: true }));
      const menu = document.createElement("select");
      const title = name.replaceAll("_", " ");
      menu.name = name;
      menu.ariaLabel = title;
      menu.append(new Option(`${title}: all`, ""), ...values.map((value) => new Option(`${title}: ${value}`, value)));
      menu.addEventListener("change", () => {
        const others = parsed(box.value).filter((token) => token.name !== name).map(({ token }) => token);
        const value = /[\s"]/.test(menu.value) ? `"${menu.value.replaceAll('"', "")}"` : menu.value;
        seek([...others, ...(menu.value ? [`${name}:${value}`] : [])].join(" "));
      });
      $("found").before(menu);
    }
  }

  // ---- the command ----

  async function copy(button) {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // a page from a server without TLS may not, but what is selected can be
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  // ---- one picture, or two beside each other ----

  const view = $("view");
  let here = -1, held = -1; // the picture shown, and the one that it is compared with

  function figure(node, card) {
    const link = card.querySelector("a.picture")?.cloneNode(true);
    const caption = document.createElement("figcaption");
    caption.textContent = (card.querySelector(".varied") ?? card.querySelector(".prompt")).textContent;
    link?.firstElementChild.removeAttribute("loading");
    node.replaceChildren(link ?? card.querySelector(".fault").cloneNode(true), caption);
  }

  function differences() {
    const [one, other] = [known[held], known[here]];
    const list = document.createElement("dl");
    const rows = [["prompt", ...[held, here].map((i) => cards[i].querySelector(".prompt").textContent)]];
    for (const name of names) rows.push([name.replaceAll("_", " "), one.fields.get(name) ?? "–", other.fields.get(name) ?? "–"]);
    for (const row of rows.filter(([, left, right]) => left !== right)) {
      const line = document.createElement("div");
      line.append(...row.map((text, i) => Object.assign(document.createElement(i ? "dd" : "dt"), { textContent: text })));
      line.className = "two";
      list.append(line);
    }
    list.className = "fields";
    return list;
  }

  function show(index) {
    if (index === undefined) return;
    here = index;
    const two = held >= 0;
    figure($("one"), cards[two ? held : here]);
    $("two").hidden = !two;
    if (two) figure($("two"), cards[here]);
    const own = cards[here].querySelectorAll(".prompt, .fault, .fields, .command");
    $("facts").replaceChildren(...(two ? [differences()] : [...own].map((node) => node.cloneNode(true))));
    $("facts").scrollTop = 0;
    const row = shown();
    $("place").textContent = `${row.indexOf(here) + 1} of ${row.length}`;
    $("compare").ariaPressed = String(two);
    if (view.open) return;
    view.showModal();
    $("after").focus();
  }

  const shown = () => [...cards.keys()].filter((i) => !cards[i].hidden);
  const others = () => shown().filter((i) => i !== held);

  /** To another picture that the filter left; past the last of this page to the first of the next. */
  function go(step) {
    const row = others();
    const next = row[row.indexOf(here) + step];
    const page = document.querySelector(step > 0 ? 'a[rel="next"]' : 'a[rel="prev"]');
    if (next === undefined && page && held < 0) {
      location.href = page.href.replace(/#.*|$/, `#q=${encodeURIComponent(box.value)}&open=${step > 0 ? "first" : "last"}`);
    }
    show(next);
  }

  function compare() {
    const row = shown();
    const at = row.indexOf(here);
    held = held < 0 ? here : -1;
    show(held < 0 ? here : row[at + 1] ?? row[at - 1] ?? here);
  }

  const KEYS = {
    ArrowRight: () => go(1), ArrowLeft: () => go(-1), Home: () => show(others()[0]), End: () => show(others().at(-1)),
    c: compare, y: () => { const button = $("facts").querySelector(".copy"); if (button) copy(button); },
  };

  /** Arrows go from picture to picture in the grid, too. */
  function walk(event) {
    const links = shown().map((i) => cards[i].querySelector("a")).filter(Boolean);
    const at = links.indexOf(document.activeElement);
    const top = (link) => link.getBoundingClientRect().top;
    const columns = Math.max(1, links.findIndex((link) => top(link) > top(links[0])));
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    const step = steps[event.key];
    if (!step || (at < 0 && event.key !== "ArrowRight")) return; // else the page scrolls
    links[at + step]?.focus();
    event.preventDefault();
  }

  // ---- what is done ----

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    if (view?.open) {
      if (!Object.hasOwn(KEYS, event.key)) return;
      event.preventDefault();
      KEYS[event.key]();
    } else if (event.key === "/") {
      event.preventDefault();
      box.focus();
    } else {
      walk(event);
    }
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest(".cards a.picture");
    const button = event.target.closest(".copy");
    if (button) copy(button);
    if (!link || !view || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(cards.indexOf(link.closest("li")));
  });
  if (view) {
    let from = 0;
    $("before").addEventListener("click", () => go(-1));
    $("after").addEventListener("click", () => go(1));
    $("compare").addEventListener("click", compare);
    $("close").addEventListener("click", () => view.close());
    view.addEventListener("close", () => { held = -1; cards[here].querySelector("a")?.focus(); });
    view.addEventListener("touchstart", (event) => {
      from = event.touches.length === 1 ? event.touches[0].clientX : NaN; // two fingers zoom
    }, { passive: true });
    view.addEventListener("touchend", (event) => {
      const way = event.changedTouches[0].clientX - from;
      if (Math.abs(way) > 80) go(way < 0 ? 1 : -1);
    });
  }
  box.addEventListener("input", () => seek(box.value));
  box.addEventListener("keydown", (event) => {
    const all = $("all");
    if (event.key === "Enter" && all) location.href = all.href;
    if (event.key === "Escape") seek("");
  });

  function read() {
    const [, sought, open] = /^#q=([^&]*)(?:&open=(first|last))?$/.exec(location.hash) ?? [];
    if (sought === undefined) return;
    try { box.value = decodeURIComponent(sought); } catch { return; }
    filter();
    if (open) show(shown().at(open === "first" ? 0 : -1));
  }
  window.addEventListener("hashchange", read);
  for (const button of document.querySelectorAll(".copy")) button.hidden = false;
  addMenus();
  $("filter").hidden = false;
  filter();
  read();
})();
