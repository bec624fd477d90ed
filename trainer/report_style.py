"""The style sheet and the script of the page that trainer.report writes."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1a1d23;--soft:#667085;--line:#e3e6eb;--raw:#a9c3f5;
--smooth:#2459c9;--lost:#c4320a;--c0:#2459c9;--c1:#e07b00;--c2:#12805c;--c3:#a63d9b;--c4:#c4320a;--c5:#5f7186;
--c6:#0e8fb3;--c7:#8a6d1a}
@media (prefers-color-scheme:dark){:root{--page:#101216;--card:#191c22;--ink:#e8eaee;--soft:#98a1b0;--line:#2b303a;
--raw:#3a5285;--smooth:#8db4ff;--lost:#ff8a65;--c0:#6f9dff;--c1:#ffad4d;--c2:#4fc79a;--c3:#dc86d2;--c4:#ff8a65;
--c5:#93a3b8;--c6:#4cc3e6;--c7:#d6b656}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:24px 16px 0}main{padding:0 16px 48px}
h1{font-size:26px;margin:0;overflow-wrap:anywhere}header p{margin:2px 0 0;color:var(--soft)}
h2{font-size:17px;margin:28px 0 10px}ul{list-style:none;margin:0;padding:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(136px,1fr));gap:10px;margin:18px 0 0}
.tiles div,figure,.samples,details,.legend{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tiles div,.legend,.samples,details{padding:10px 14px}
dt{color:var(--soft);font-size:13px}dd{margin:0;font-size:18px;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}
figure{margin:0;padding:10px 12px 6px}figcaption{display:flex;justify-content:space-between;gap:8px}
figcaption span,.legend span{color:var(--soft);font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto;touch-action:pan-y}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.grid line{stroke:var(--line)}.raw,.smooth{fill:none;stroke-linejoin:round}.raw{stroke:var(--raw);stroke-width:1}
.smooth{stroke:var(--smooth);stroke-width:2}.lost{stroke:var(--lost);stroke-width:1.5}
.cursor{stroke:var(--soft);opacity:0}
.bar{display:flex;height:26px;border-radius:8px;overflow:hidden;gap:2px;margin-bottom:10px}
.legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:6px 18px}
.legend li{display:grid;grid-template-columns:14px 1fr auto 44px;gap:8px;align-items:center}
.legend li i{width:12px;height:12px;border-radius:3px}.legend span{text-align:right}
.c0{background:var(--c0)}.c1{background:var(--c1)}.c2{background:var(--c2)}.c3{background:var(--c3)}
.c4{background:var(--c4)}.c5{background:var(--c5)}.c6{background:var(--c6)}.c7{background:var(--c7)}
.samples p{margin:10px 0 4px}
.strip{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(104px,1fr);gap:8px;overflow-x:auto}
.strip li{color:var(--soft);font-size:13px}
figure p{margin:4px 0 4px;color:var(--soft);font-size:13px}
.level{margin-top:12px}.level li{margin-top:8px}.level span{color:var(--soft);font-size:13px}
.strip img{display:block;width:100%;height:auto;border-radius:6px;border:1px solid var(--line)}
summary{cursor:pointer}pre{overflow-x:auto;font-size:13px;margin:8px 0 0}
"""

SCRIPT = """
for (const svg of document.querySelectorAll("svg[data-points]")) {
  const points = JSON.parse(svg.dataset.points), cursor = svg.querySelector(".cursor");
  const readout = svg.parentElement.querySelector("figcaption span"), settled = readout.textContent;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const [x, step, value] = points.reduce((a, b) => Math.abs(a[0] - at) < Math.abs(b[0] - at) ? a : b);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.opacity = 1;
    readout.textContent = `step ${step}: ${value}`;
  });
  svg.addEventListener("pointerleave", () => { cursor.style.opacity = 0; readout.textContent = settled; });
}
"""
