"use strict";
// What the page holds is in its HTML; this sorts, filters and rearranges it, and makes no text into HTML.

const byId = (id) => document.getElementById(id);
const create = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};
const folded = (text) => text.normalize("NFKC").toLowerCase().replace(/\s+/g, " ").trim();
const counted = (shown, all, what) => (shown === all ? `${all} ${what}` : `${shown} of ${all} ${what}`);

document.querySelectorAll("[hidden]").forEach((control) => { control.hidden = false; });

// Light and dark.
{
  const button = byId("theme"), system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const tell = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    tell();
  });
  system.addEventListener("change", tell);
  tell();
}

// Tables: a click on a header sorts, a second one the other way round, a third restores the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], original = [...body.rows];
  const headers = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const last = headers.findLastIndex((header) => header.classList.contains("label"));
  for (const row of [headers, ...original.map((each) => [...each.cells])]) row[last]?.classList.add("pinned");

  const value = (row, column) => {
    const cell = row.cells[column];
    if (headers[column].classList.contains("number")) return "value" in cell.dataset ? Number(cell.dataset.value) : null;
    return folded(cell.textContent) || null;
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  headers.forEach((header, column) => {
    const button = create("button", { type: "button" }, ...header.childNodes);
    if (header.hasAttribute("aria-label")) {
      button.setAttribute("aria-label", header.getAttribute("aria-label"));
      header.removeAttribute("aria-label");
    }
    header.append(button);
    button.addEventListener("click", () => {
      const { first } = header.dataset, second = first === "ascending" ? "descending" : "ascending";
      const next = { [first]: second, [second]: null }[header.getAttribute("aria-sort")];
      const order = next === undefined ? first : next;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      if (order) header.setAttribute("aria-sort", order);
      body.classList.toggle("sorted", Boolean(order));
      const sign = order === "descending" ? -1 : 1;
      const known = original.filter((row) => order && value(row, column) !== null);
      known.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      // What has no number comes last in both directions.
      body.append(...known, ...original.filter((row) => !known.includes(row)));
    });
  });

  const input = document.querySelector(`[data-filters="${table.id}"]`);
  const count = document.querySelector(`[data-counts="${table.id}"]`);
  const filter = () => {
    const words = folded(input.value).split(" ");
    for (const row of original) {
      const text = folded([...row.cells].map((cell) => cell.textContent).join(" "));
      row.hidden = !words.every((word) => text.includes(word));
    }
    count.textContent = counted(original.filter((row) => !row.hidden).length, original.length, "rows");
  };
  input.addEventListener("input", filter);
  filter();
}

// Trials by id and configuration.
{
  const trials = [...document.querySelectorAll("details.trial")], input = byId("find-trial");
  const filter = () => {
    const words = folded(input.value).split(" ");
    for (const trial of trials) trial.hidden = !words.every((word) => folded(trial.textContent).includes(word));
    byId("trials-shown").textContent = counted(trials.filter((trial) => !trial.hidden).length, trials.length, "trials");
  };
  input.addEventListener("input", filter);
  filter();
}

// Pictures: one by one, or those of two rows side by side on the same expressions.
if (byId("pictures")) {
  const list = byId("pictures"), form = byId("choose"), large = byId("large");
  const figures = [...list.querySelectorAll("figure")];
  const iou = (figure) => Number(figure.dataset.iou);
  const expression = (figure) => figure.querySelector(".expression").textContent;
  let units = [], open = 0;

  for (const figure of figures) {
    const image = figure.querySelector("img"), button = create("button", { type: "button", className: "open" });
    button.setAttribute("aria-haspopup", "dialog");
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => show(units.findIndex((unit) => unit.includes(figure))));
  }

  const update = () => {
    const chosen = (id) => byId(id)?.value ?? "";
    const [first, second, kind, order] = ["first", "second", "kind", "order"].map(chosen);
    const [least, most] = [["least", 0], ["most", 100]].map(([id, none]) => (chosen(id) === "" ? none : Number(chosen(id))) / 100);
    const words = folded(chosen("words")).split(" ");
    const fits = (figure) =>
      iou(figure) >= least && iou(figure) <= most && (!kind || figure.dataset.kinds.split("|").includes(kind));
    const asked = (figure) =>
      (!chosen("dataset") || figure.dataset.dataset === chosen("dataset")) &&
      words.every((word) => folded(expression(figure)).includes(word));
    const possible = figures.filter(asked), pairs = Boolean(first && second && first !== second);
    if (pairs) {
      // A pair is shown where one of the two fits.
      const others = new Map(possible.filter((each) => each.dataset.row === second).map((each) => [each.dataset.key, each]));
      units = possible
        .filter((each) => each.dataset.row === first && others.has(each.dataset.key))
        .map((each) => [each, others.get(each.dataset.key)])
        .filter((unit) => unit.some(fits));
    } else {
      const row = first || second;
      units = possible.filter((each) => (!row || each.dataset.row === row) && fits(each)).map((each) => [each]);
    }
    byId("order").querySelector("[value=difference]").disabled = !pairs;
    const difference = (unit) => (pairs ? iou(unit[1]) - iou(unit[0]) : 0);
    const by = {
      low: (a, b) => Math.min(...a.map(iou)) - Math.min(...b.map(iou)),
      high: (a, b) => Math.max(...b.map(iou)) - Math.max(...a.map(iou)),
      difference: (a, b) => Math.abs(difference(b)) - Math.abs(difference(a)),
    }[order];
    if (by) units.sort(by);
    list.classList.toggle("pairs", pairs);
    list.replaceChildren(...units.map((unit) => {
      if (!pairs) return create("li", {}, ...unit);
      const points = 100 * difference(unit), sign = points < 0 ? "−" : "+";
      const name = create("bdi", { className: "expression" }, expression(unit[0]));
      const change = create("span", { className: "quiet" }, ` ${sign}${Math.abs(points).toFixed(1)}`);
      return create("li", { className: "pair" }, create("p", {}, create("b", {}, "“", name, "”"), change), create("div", {}, ...unit));
    }));
    const all = pairs ? new Set(figures.map((each) => each.dataset.key)).size : figures.length;
    byId("shown").textContent = counted(units.length, all, pairs ? "expressions" : "pictures");
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));

  const show = (index) => {
    open = index;
    const copies = units[open].map((figure) => figure.cloneNode(true));
    for (const button of copies.map((copy) => copy.querySelector("button"))) button.replaceWith(...button.childNodes);
    byId("enlarged").replaceChildren(...copies);
    byId("previous").disabled = open === 0;
    byId("next").disabled = open === units.length - 1;
    if (!large.open) large.showModal();
  };
  const step = (by) => units[open + by] && show(open + by);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => large.close());
  large.addEventListener("click", (event) => event.target === large && large.close());
  large.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) step(by);
  });
  update();
}

document.documentElement.dataset.ready = "";
