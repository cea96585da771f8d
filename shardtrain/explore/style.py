"""Colours and layout of the page, light and dark, from one set of CSS variables."""

GROUPS = {
    "compute": ("matmul", "attention", "logits"),
    "elementwise": ("elementwise", "launch"),
    "recompute": ("recompute",),
    "communication": ("tensor", "context", "expert", "fsdp", "pipeline", "data"),
    "bubble": ("bubble",),
    "optimizer": ("optimizer", "offload"),
    "scale": ("scale",),
}
"""How the terms of a step are drawn together."""

TERM_WORDS = {
    "matmul": "matrix multiplications of the blocks",
    "attention": "attention scores and values",
    "elementwise": "norms, residuals, activations: bound by memory bandwidth",
    "logits": "output matrix and loss",
    "recompute": "forward work repeated in the backward pass",
    "launch": "what no kernel covers, per block and microbatch",
    "tensor": "collectives of tensor parallelism that compute does not hide",
    "context": "keys and values gathered over the sequence, not hidden",
    "expert": "all-to-all of routed tokens, not hidden",
    "fsdp": "parameter gathers and gradient scatters, not hidden",
    "pipeline": "transfers between stages, not hidden",
    "bubble": "stages waiting for each other",
    "data": "gradient reduction between replicas, not hidden",
    "optimizer": "the update",
    "offload": "the update on the host, and its copies",
    "scale": "jitter and stragglers",
}

CSS = """
.stx{--bg:#fff;--card:#f7f8fa;--ink:#1c2330;--soft:#5b6575;--line:#dde1e8;--accent:#1f6feb;
--bad:#b42318;--good:#12723f;--c0:#4c78a8;--c1:#e07b1f;--c2:#3f9b5c;--c3:#a45fb0;--c4:#c9a227;
--c5:#d1495b;--c6:#7b8794;
color:var(--ink);background:var(--bg);font:14px/1.45 system-ui,-apple-system,"Segoe UI",sans-serif;
padding:16px;box-sizing:border-box;container-type:inline-size}
@media (prefers-color-scheme:dark){.stx{--bg:#12161d;--card:#1b212b;--ink:#e6eaf1;--soft:#9aa5b5;
--line:#313a48;--accent:#6ea8fe;--bad:#ff8f85;--good:#6fd39b;--c0:#7fb0e0;--c1:#f2a25c;
--c2:#74cf92;--c3:#cf95da;--c4:#e3c65b;--c5:#f08494;--c6:#9aa5b5}}
.stx *{box-sizing:border-box}
.stx h1{font-size:20px;margin:0 0 4px}.stx h2{font-size:15px;margin:0 0 8px}
.stx p{margin:4px 0;max-width:90ch}.stx .soft{color:var(--soft)}
.stx code{background:var(--card);border:1px solid var(--line);border-radius:4px;padding:1px 5px;
font:12px/1.5 ui-monospace,Consolas,monospace;overflow-wrap:anywhere;color:var(--ink)}
.stx .facts{display:flex;flex-wrap:wrap;gap:8px 28px;margin:12px 0}
.stx .facts div{min-width:86px}.stx .facts b{display:block;font-size:20px;line-height:1.2}
.stx .grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:14px;
margin:14px 0;align-items:start}
.stx .card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;
min-width:0}
.stx .wide{grid-column:1/-1}.stx svg{width:100%;height:auto;display:block}
.stx svg text{fill:var(--ink);font-family:inherit}.stx svg .soft{fill:var(--soft)}
.stx svg .rule{stroke:var(--line);stroke-width:1}.stx svg .limit{stroke:var(--bad);
stroke-width:1.5;stroke-dasharray:5 4}
.stx svg .front{fill:none;stroke:var(--soft);stroke-width:1.5}
.stx svg a:hover circle,.stx svg circle:hover{stroke:var(--ink);stroke-width:2.5}
.stx .bar{display:flex;height:18px;border-radius:3px;position:relative;background:var(--bg)}
.stx .bar i{display:block;height:100%}.stx .bar i:first-child{border-radius:3px 0 0 3px}
.stx .bar u{position:absolute;top:-3px;bottom:-3px;width:0;border-left:2px dashed var(--bad)}
.stx .row{margin:0 0 9px}.stx .row span{display:flex;justify-content:space-between;gap:8px}
.stx .key{display:flex;flex-wrap:wrap;gap:2px 12px;color:var(--soft);font-size:12px;margin-top:6px}
.stx .key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:4px}
.stx .scroll{overflow-x:auto}
.stx table{border-collapse:collapse;width:100%;font-size:13px;margin:0;color:var(--ink)}
.stx .families{min-width:820px}
.stx th,.stx td{padding:5px 9px;text-align:left;vertical-align:top;border-top:1px solid var(--line);
background:none}
.stx th{color:var(--soft);font-weight:600;border-top:0;white-space:nowrap}
.stx .num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.stx tr:target td{background:color-mix(in srgb,var(--accent) 18%,transparent)}
.stx tr.best td{font-weight:600}.stx tr.lost td{color:var(--soft)}
.stx td.why{min-width:220px}
.stx details{margin-top:8px}.stx summary{cursor:pointer;color:var(--accent)}
.stx .tabs>input{position:absolute;opacity:0;width:1px;height:1px}
.stx .tabs>label{display:inline-block;padding:4px 10px;margin:0 4px 6px 0;border:1px solid
var(--line);border-radius:14px;cursor:pointer;font-size:13px}
.stx .tabs>section{display:none}
.stx .tabs>input:focus-visible+label{outline:2px solid var(--accent)}
.stx .tabs>input:checked+label{background:var(--accent);border-color:var(--accent);color:var(--bg)}
"""
"""Scoped to `.stx`, so that it can stand in a notebook beside other output."""

COLOURS = tuple(f"var(--c{n})" for n in range(7))
