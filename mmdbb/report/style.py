# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The page's style sheet and script, which stand inside the page."""

#: Colours of branches, in the order in which a network has them; the same on
#: light and dark, told apart by colour-blind readers too (Okabe and Ito,
#: "Color Universal Design", 2008).
COLOURS = (
    '#0072b2',
    '#e69f00',
    '#009e73',
    '#cc79a7',
    '#d55e00',
    '#56b4e9',
    '#9c8b2f',
    '#7d7d7d',
)

CSS = """
:root {
  color-scheme: light;
  --page: #f6f7f8; --card: #fff; --ink: #1a1f24; --soft: #56616c;
  --line: #dfe3e7; --accent: #0b6380; --good: #17703a; --bad: #b3261e;
  --note: #0b6380; --wash: #eef2f4; --shade: 0 1px 2px #0f172a14;
}
@media (prefers-color-scheme: dark) {
  :root:not([data-theme=light]) {
    color-scheme: dark;
    --page: #0f1317; --card: #171c22; --ink: #e6e9ed; --soft: #9ba7b3;
    --line: #2a323a; --accent: #67c7e0; --good: #6fce92; --bad: #ff8f83;
    --note: #67c7e0; --wash: #1f262d; --shade: none;
  }
}
:root[data-theme=dark] {
  color-scheme: dark;
  --page: #0f1317; --card: #171c22; --ink: #e6e9ed; --soft: #9ba7b3;
  --line: #2a323a; --accent: #67c7e0; --good: #6fce92; --bad: #ff8f83;
  --note: #67c7e0; --wash: #1f262d; --shade: none;
}
* { box-sizing: border-box; }
html { scroll-padding-top: 12px; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
    "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
.skip { position: absolute; left: -999px; }
.skip:focus { left: 8px; top: 8px; background: var(--card); padding: 8px; }
main, header, footer { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; display: flex; gap: 16px; align-items: start; }
header > div { flex: 1; min-width: 0; }
h1 { font-size: 27px; line-height: 1.2; margin: 2px 0 8px; font-weight: 680;
  letter-spacing: -.012em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 6px; letter-spacing: -.005em; }
h3 { font-size: 14px; margin: 20px 0 6px; }
p { margin: 6px 0; max-width: 74ch; }
.kicker, .quiet, figcaption { color: var(--soft); font-size: 13px; }
.kicker { margin: 0; letter-spacing: .02em; }
code { font: 12.5px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 22px; margin: 0;
  color: var(--soft); font-size: 13px; }
.facts div { display: flex; gap: 6px; min-width: 0; }
.facts dt::after { content: ":"; }
.facts dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
button, input { font: inherit; color: inherit; }
.plain { border: 1px solid var(--line); background: var(--card);
  border-radius: 8px; padding: 6px 12px; cursor: pointer; font-size: 13px; }
.plain:hover { border-color: var(--soft); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.cards { display: grid; gap: 12px; margin: 22px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(184px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 13px 16px; box-shadow: var(--shade); }
.card > b { display: block; font-size: 19px; line-height: 1.35;
  font-weight: 660; font-variant-numeric: tabular-nums;
  letter-spacing: -.015em; white-space: nowrap; }
.card span { color: var(--soft); font-size: 13px; }
.card .label { display: block; }
.chart { margin-top: 12px; } .chart .legend { margin: 10px 0 0; }
.columns { display: flex; gap: clamp(1px, .4%, 6px); height: 132px;
  margin-top: 10px; }
.columns a { flex: 1; display: flex; flex-direction: column; gap: 1px;
  min-width: 1px; border-radius: 3px; overflow: hidden; }
.columns a:hover { opacity: .8; }
.columns i { background: var(--c); }
.columns i.minus { background: repeating-linear-gradient(135deg,
  var(--c) 0 3px, transparent 3px 6px); }
.good { color: var(--good); } .bad { color: var(--bad); }
ul.findings { list-style: none; margin: 18px 0 0; padding: 0;
  display: grid; gap: 8px; }
.findings li { background: var(--card); border: 1px solid var(--line);
  border-left: 4px solid var(--note); border-radius: 8px;
  padding: 8px 14px; }
.findings li.warning { border-left-color: var(--bad); }
.findings li.good { border-left-color: var(--good); color: inherit; }
.scroll { overflow-x: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px;
  box-shadow: var(--shade); margin: 10px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 560;
  font-size: 12.5px; vertical-align: bottom; background: var(--wash); }
th:first-child, td:first-child, .left { text-align: left !important; }
tbody th { font-weight: 500; }
td code, th code { overflow-wrap: normal; }
tbody tr:hover > * { background: var(--wash); }
th button { all: unset; cursor: pointer; display: inline-block;
  padding: 3px 0; }
th button::after { content: "\\2195"; opacity: .45; padding-left: 4px; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
th button:focus-visible { outline: 2px solid var(--accent); }
html:not(.js) .needs-js, html:not(.js) th button::after { display: none; }
a { color: var(--accent); text-underline-offset: 2px; }
.swatch { display: inline-block; width: 11px; height: 11px;
  border-radius: 3px; margin-right: 7px; background: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0;
  padding: 0; list-style: none; font-size: 13px; }
.bar { display: flex; height: 14px; min-width: 130px; border-radius: 4px;
  overflow: hidden; background: var(--line); gap: 1px; }
.bar i { background: var(--c); min-width: 1px; }
.bar i.minus { background: repeating-linear-gradient(135deg, var(--c) 0 3px,
  transparent 3px 6px); }
.part { display: inline-block; height: 9px; border-radius: 3px;
  background: var(--c); margin-right: 8px; vertical-align: 1px; }
.tools { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center;
  margin: 12px 0; }
.tools input { border: 1px solid var(--line); background: var(--card);
  border-radius: 8px; padding: 6px 11px; min-width: 220px; }
details { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; margin: 8px 0; content-visibility: auto;
  contain-intrinsic-size: auto 46px; }
summary { padding: 10px 14px; cursor: pointer; display: flex; gap: 14px;
  align-items: center; border-radius: 10px; }
summary::-webkit-details-marker { display: none; }
summary::before { content: "\\25b8"; color: var(--soft); }
details[open] > summary::before { content: "\\25be"; }
summary code { flex: 1; font-size: 13px; min-width: 0; }
summary .bar { flex: 0 0 190px; }
.inside { padding: 2px 16px 16px; }
.inside .scroll { box-shadow: none; }
.kernels { display: flex; flex-wrap: wrap; gap: 14px 18px; margin: 8px 0; }
figure { margin: 0; }
figcaption { margin-top: 4px; max-width: 130px; }
figcaption.wide { max-width: none; }
img { image-rendering: pixelated; display: block; border-radius: 4px;
  background: var(--wash); max-width: 100%; }
.sheet img { height: auto; }
.two { display: grid; gap: 8px 32px; grid-template-columns:
  minmax(0, 3fr) minmax(0, 2fr); align-items: start; }
svg.line { width: 100%; height: 60px; display: block; }
svg.line polygon { fill: var(--accent); opacity: .16; }
svg.line polyline { fill: none; stroke: var(--accent); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
dl.words { display: grid; grid-template-columns: max-content 1fr;
  gap: 6px 20px; }
dl.words dt { font-weight: 600; } dl.words dd { margin: 0; max-width: 76ch; }
.visually-hidden { position: absolute; width: 1px; height: 1px;
  overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
footer { padding-top: 24px; padding-bottom: 48px; color: var(--soft);
  font-size: 13px; }
@media (min-width: 701px) { th wbr { display: none; } }
@media (max-width: 700px) {
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 18px; }
  h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 30px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; }
  .card { padding: 10px 12px; } .card > b { font-size: 15px; }
  .two, dl.words { grid-template-columns: 1fr; }
  dl.words dt { margin-top: 6px; }
  summary { flex-wrap: wrap; gap: 6px 10px; }
  summary .bar { flex: 1 0 100%; }
  summary .quiet { flex: 1 0 100%; }
  th, td { padding: 8px 10px; }
  .names th:first-child, .names td:first-child { position: sticky; left: 0;
    background: var(--card); max-width: 44vw; white-space: normal;
    min-width: 8.6rem; box-shadow: 1px 0 0 var(--line); }
  .names th:first-child code { overflow-wrap: break-word; }
  .names .swatch + code { overflow-wrap: normal; white-space: nowrap; }
  .names thead th:first-child { background: var(--wash); }
  .tools input { flex: 1 1 100%; }
}
@media print {
  .needs-js, .skip { display: none; } body { background: #fff; }
}
"""

SCRIPT = """
(() => {
  const root = document.documentElement, key = 'mmdbb-theme';
  root.classList.add('js');
  const read = () => { try { return localStorage.getItem(key); }
    catch { return null; } };
  const dark = () => root.dataset.theme ? root.dataset.theme === 'dark'
    : matchMedia('(prefers-color-scheme: dark)').matches;
  const button = document.getElementById('theme');
  const show = () => {
    button.textContent = dark() ? 'Light' : 'Dark';
    button.setAttribute('aria-label',
      `Switch to ${dark() ? 'light' : 'dark'} colours`);
  };
  if (['light', 'dark'].includes(read())) root.dataset.theme = read();
  show();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', show);
  button.addEventListener('click', () => {
    root.dataset.theme = dark() ? 'light' : 'dark';
    try { localStorage.setItem(key, root.dataset.theme); } catch {}
    show();
  });

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = text === '' ? NaN : Number(text);
    return Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => {
    // Cells without a value come last, whichever the direction.
    if (a === '' || b === '') return (a === '') - (b === '') || 0;
    return typeof a === 'number' && typeof b === 'number' ? a - b
      : String(a).localeCompare(String(b), 'en', {numeric: true});
  };
  for (const table of document.querySelectorAll('table.sortable')) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const sorter = head.querySelector('button');
      if (!sorter) return;
      sorter.addEventListener('click', () => {
        const old = head.getAttribute('aria-sort');
        const first = head.dataset.first || 'ascending';
        const other = first === 'ascending' ? 'descending' : 'ascending';
        const order = old === first ? other : first;
        heads.forEach(h => h.removeAttribute('aria-sort'));
        head.setAttribute('aria-sort', order);
        const sign = order === 'ascending' ? 1 : -1;
        const rows = [...table.tBodies[0].rows];
        const keys = new Map(rows.map(row => [row, valueOf(row, column)]));
        rows.sort((a, b) => {
          const [x, y] = [keys.get(a), keys.get(b)];
          const missing = x === '' || y === '';
          return (missing ? 1 : sign) * compare(x, y);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  const filter = document.getElementById('filter');
  const shown = document.getElementById('shown');
  filter?.addEventListener('input', () => {
    const text = filter.value.toLowerCase();
    let count = 0;
    for (const each of document.querySelectorAll('[data-layer]')) {
      each.hidden = !each.dataset.layer.toLowerCase().includes(text);
      count += !each.hidden && each.tagName === 'TR';
    }
    shown.textContent = text ? `${count} shown` : '';
  });

  const all = document.getElementById('all');
  const layers = [...document.querySelectorAll('details.layer')];
  all?.addEventListener('click', () => {
    const open = all.getAttribute('aria-pressed') !== 'true';
    all.setAttribute('aria-pressed', open);
    all.textContent = open ? 'Close all' : 'Open all';
    layers.forEach(layer => { layer.open = open; });
  });
  const follow = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target?.tagName !== 'DETAILS') return;
    target.open = true;
    target.scrollIntoView();
    target.querySelector('summary').focus({preventScroll: true});
  };
  addEventListener('hashchange', follow);
  follow();
})();
"""
