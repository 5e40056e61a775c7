"""The report page's style sheet: light, dark, phone and print."""

from __future__ import annotations

# Series colours tell apart by lightness and by blue against orange, whatever the eye's cones.
CSS = """
:root { --bg: #fff; --fg: #1b1f24; --soft: #5b6470; --rule: #d6dae0; --grid: #eceef1;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b04f86; --c4: #c98a00; --c5: #3f9bd3;
  --c6: #4a4a4a; --c7: #5e3c99; }
@media screen and (prefers-color-scheme: dark) {
  :root { --bg: #14171b; --fg: #e6e9ed; --soft: #a0a8b3; --rule: #3a4149; --grid: #262b31;
    --c0: #3d9fdc; --c1: #ff8a3d; --c2: #2fc795; --c3: #e79ac4; --c4: #f2bd4a; --c5: #93d2ff;
    --c6: #c4c8cd; --c7: #ab90e6; } }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 64rem; background: var(--bg);
  color: var(--fg); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
header p, figcaption, footer, small, dt { color: var(--soft); }
header p { margin: .2rem 0 0; overflow-wrap: anywhere; }
figure { margin: 0 0 1.4rem; } figcaption { font-size: .87rem; max-width: 46rem; }
small { font-size: .8em; white-space: nowrap; }
.wide { overflow-x: auto; margin-bottom: 1rem; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--fg);
  paint-order: stroke; stroke: var(--bg); stroke-width: 3px; stroke-linejoin: round; }
svg text.name { fill: var(--soft); }
svg path { fill: none; } .axis, .border { stroke: var(--soft); fill: none; }
.grid { stroke: var(--grid); } .frontier { stroke: var(--rule); stroke-width: 2; }
.dot { fill: var(--c); stroke: var(--bg); stroke-width: .8; } .line { stroke: var(--c);
  stroke-width: 1.7; stroke-linejoin: round; }
.leader { stroke: var(--c); stroke-width: .8; opacity: .7; }
svg path.area { fill: var(--c); fill-opacity: .35; stroke: var(--c); stroke-width: .8; }
.median { stroke: var(--fg); stroke-width: 1.6; } .ring { fill: var(--bg); stroke: var(--c);
  stroke-width: 1.8; }
.glass { fill: transparent; } .glass:hover { stroke: var(--fg); }
.pixels { image-rendering: pixelated; }
svg:has(.mark:hover) .mark:not(:hover) { opacity: .3; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { position: sticky; left: 0; background: var(--bg); text-align: left;
  font-weight: 500; min-width: 8rem; max-width: 17rem; }
th { white-space: normal; overflow-wrap: break-word; }
td small { display: block; }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .4em;
  background: var(--c); border-radius: 2px; print-color-adjust: exact; }
.ramp { display: inline-block; width: 8em; height: .7em; print-color-adjust: exact; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1.2rem; }
dd { margin: 0; overflow-wrap: anywhere; } ul { margin-top: .2rem; }
.columns { columns: 15rem; font-size: .87rem; }
footer { margin-top: 2rem; font-size: .87rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } svg { min-width: 0; }
  .wide { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: 1.5pt 3pt; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""
