"""The style sheet of all pages: one column, system fonts, light and dark, narrow and wide."""

CSS = """
:root { color-scheme: light dark;
  --ground: #fbfbfa; --surface: #ffffff; --ink: #1c2024; --soft: #5f6874; --line: #e3e5e8;
  --accent: #2f6fde; --right: #1f8f4e; --wrong: #cf3a3a; --wash: #f1f3f6; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171a; --surface: #1c2025; --ink: #e8eaed; --soft: #9aa4b0; --line: #2e343b;
  --accent: #6ea0ff; --right: #3fbf76; --wrong: #ff6b6b; --wash: #242a31; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { margin-bottom: 2rem; }
.over { margin: 0 0 .25rem; color: var(--soft); font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; }
h1 { margin: 0; font-size: clamp(1.6rem, 4vw, 2.25rem); line-height: 1.2; letter-spacing: -.015em; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .35rem; font-size: 1.25rem; letter-spacing: -.01em; font-weight: 650; }
p { margin: .35rem 0; max-width: 46rem; }
.lead { color: var(--soft); }
.note { border-left: 3px solid var(--accent); background: var(--wash); padding: .6rem .9rem; margin: 1rem 0;
  border-radius: 0 6px 6px 0; max-width: none; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(2, 1fr); gap: .75rem; margin: 1.5rem 0; padding: 0; }
@media (min-width: 40rem) { .cards { grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); } }
.card { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem .85rem; }
.card dt { color: var(--soft); font-size: .82rem; }
.card dd { margin: .1rem 0 0; font-size: 1.55rem; font-weight: 620; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card small { display: block; font-size: .78rem; font-weight: 400; letter-spacing: 0; color: var(--soft);
  line-height: 1.35; }
.card.main { grid-column: span 2; background: var(--accent); border-color: var(--accent); color: #fff; }
.card.main dd { font-size: 2.1rem; line-height: 1.15; }
.card.main dt, .card.main small { color: rgba(255, 255, 255, .86); }
@media (prefers-color-scheme: dark) { .card.main { background: #2456b0; border-color: #2456b0; } }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .75rem;
  margin-top: 1rem; }
figure { margin: 0; background: var(--surface); border: 1px solid var(--line); border-radius: 10px;
  padding: .75rem .75rem .7rem; }
.plots figure { max-width: 34rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .84rem; line-height: 1.45; padding: .35rem .35rem 0; }
.scroll { overflow-x: auto; margin-top: .75rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .38rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .82rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
td.bar { width: 45%; min-width: 8rem; text-align: left; }
.track { display: block; background: var(--wash); border-radius: 4px; height: .65rem; overflow: hidden; }
.fill { display: block; height: 100%; background: var(--accent); border-radius: 4px; }
details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--accent); }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.query { display: grid; grid-template-columns: 8rem 1fr; gap: 1rem; padding: 1.1rem 0;
  border-top: 1px solid var(--line); align-items: start; }
.neighbours { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.1rem, 1fr)); gap: .6rem; margin: 0;
  padding: 0; list-style: none; }
.tile { min-width: 0; font-size: .78rem; line-height: 1.3; }
.frame { display: grid; place-items: center; aspect-ratio: 1; border: 3px solid var(--line); border-radius: 8px;
  overflow: hidden; background: var(--wash); color: var(--soft); text-align: center; }
.frame img { width: 100%; height: 100%; object-fit: contain; }
.frame img.tiny { image-rendering: pixelated; }
.right .frame { border-color: var(--right); } .wrong .frame { border-color: var(--wrong); border-style: dashed; }
.caption { display: block; margin-top: .25rem; overflow-wrap: anywhere; }
.caption b { font-weight: 600; }
.right b.mark { color: var(--right); } .wrong b.mark { color: var(--wrong); }
.soft { color: var(--soft); }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .86rem; }
@media (max-width: 34rem) { main { padding-top: 1.5rem; } .query { grid-template-columns: 1fr; }
  .query > .tile { display: grid; grid-template-columns: 6rem 1fr; gap: .75rem; align-items: center; } }
@media print { body { background: #fff; } figure, .card, .query { break-inside: avoid; } }
"""
