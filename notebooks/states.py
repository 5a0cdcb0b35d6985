# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: jupytext,kernelspec,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside the recurrent state
#
# Three quarters of a Qwen3.5 are Gated DeltaNet layers. What such a layer knows of all tokens so far is one matrix for
# each head: `S <- exp(g) S`, then `S <- S + k u^T` with `u = beta (v - S^T k)`. This notebook asks of the *organism*,
# the small Qwen3.5 that ships with the suite: which carries a persona from the system turn to the answer, which tokens
# wrote it, can it be written by hand, and can it be read?

# %%
import torch
from IPython.display import HTML

from analysis import figures
from probes.attribution import attribute_readout, statistics
from probes.behaviors import read_behavior
from probes.capture import RECURRENCE, capture, recurrences
from probes.directions import low_rank, mean_difference
from probes.linear import ProbeConfig, cells, probe_all
from probes.localize import LocalizeConfig, localize
from probes.model import load
from probes.pairs import contrast
from probes.propensity import generate, prepare, propensity
from probes.recurrence import Directions, scan
from probes.steering import steer

model = load("organism")
behavior = read_behavior("follow-direction")
fit, held_out = behavior.split(held_out=0.4)
kinds = [layer.kind for layer in model.layers]
print(model, behavior, sep="\n")

# %% [markdown]
# ## Who carries it?
#
# The same prompt is run under both personas. Then what one persona left in the states (or in the convolutions' windows,
# or in attention's keys and values) is put into the cache of the other, and only the last prompt token and the answer
# are run again. Nothing else crosses tokens: the shares say what travels where. `dispositions localize` does this with
# more prompts and controls, and writes a page.

# %%
where = localize(model, behavior, LocalizeConfig(prompts=16, controls=19, layer_controls=2), progress=False)
print(where.table())
print(where.sentence)

# %%
figures.channels(where)

# %%
figures.layer_by_layer(where)

# %% [markdown]
# ## A direction in the state
#
# The mean difference between the personas is one matrix for each head. A layer writes matrices of rank 1; how much of
# the direction survives such a cut?

# %%
best = max(where.layers("give", "gdn.state"), key=lambda row: row.effect.value).layer or 0
pairs = contrast(model, fit, site="gdn.state", progress=False)
direction, cut = mean_difference(pairs[best]), low_rank(pairs[best], rank=1)
print(direction, f"{cut}, cosine with it {float(direction.vector @ cut.vector):.2f}", sep="\n")
figures.state_heatmap(
    {layer: mean_difference(both).tensor.norm(dim=(1, 2)) * mean_difference(both).gap for layer, both in pairs.items()},
    kinds=kinds,
    title="How far the personas part the states",
    unit="norm of the mean difference",
)

# %% [markdown]
# ## Writing it by hand
#
# A state is edited once, before the last prompt token, and the recurrence carries the edit on. Doses are in units of
# the state's typical norm. Ordinary prompts, no persona:

# %%
judged = held_out.take(32)
prepared = prepare(model, judged)
for one in (direction, cut):
    print(one.method)
    for dose in (-1.0, -0.25, 0.0, 0.25, 1.0):
        with steer(model, one, dose=dose, phase="prefill"):
            print(f"  dose {dose:>5}: {propensity(model, prepared)}")

# %%
prompt = judged.items[0].prompt(model)
print("asked:  ", judged.items[0].messages[-1]["content"])
for dose in (-1.0, 1.0):
    with steer(model, direction, dose=dose, phase="prefill"):
        print(f"{dose:>+5}:   ", generate(model, [prompt], max_new_tokens=16)[0])

# %% [markdown]
# ## Which tokens wrote it?
#
# The recurrence is linear in the values, so each token has an exact part in what a state says along a direction, decay
# and erasure included. Here it is for one prompt under the wanted persona.

# %%
spoken = judged.items[0].prompt(model, persona="wanted")
record = capture(model, [spoken], sites=RECURRENCE, positions="all", progress=False)
x = recurrences(record, layer=best)[0]
tokens = [model.tokenizer.decode([i]) for i in spoken.ids]
last = torch.tensor([[len(tokens) - 1]])
read = Directions.of(direction.tensor, rank=min(direction.shape[1:]))
parts = attribute_readout(x, read, at=last)
head = int(parts.whole[0, 0].abs().argmax())
whole = scan(x, directions=read).readouts[0, -1, head]  # what the state says after the last token, from a scan
print(
    f"head {head}: the tokens' parts add up to {float(parts.tokens[0, 0, head].sum()):.4f}, the state says {whole:.4f}"
)
HTML(figures.attribution_text(tokens, parts.shares[0, 0, head], title=f"Who wrote it: layer {best}, head {head}"))

# %% [markdown]
# The same direction, read after every token: one more query in one scan, and no trajectory of states is kept.

# %%
trajectory = scan(x, directions=read).readouts
named = {"context": "context", "direction": "request", "decision": "decision"}
spans = {named[name]: span for name, span in spoken.spans.items()}
figures.readout_trajectories(
    {f"head {h}": trajectory[0, :, h] for h in range(trajectory.shape[2])},
    tokens,
    title=f"What layer {best} says along the direction",
    unit="readout along the direction",
    spans=spans,
)

# %% [markdown]
# How long does a head remember, and how much of what it writes is new to it?

# %%
found = statistics(x, at=last).frame().groupby("v_head")[["write", "half_life", "novelty"]].median()
found

# %% [markdown]
# ## Implicit attention beside attention
#
# A readout is a weighted sum of all values so far: `o_t = sum_s A[t, s] v_s`, exactly, of either sign. For the last
# prompt token, GDN layers above, attention layers below:

# %%
looks = capture(model, [spoken], sites=("gdn.attention", "attn.pattern"), positions="last", progress=False)
rows = {
    site: {
        f"layer {layer} head {h}": looks[site, layer][0][h]
        for layer in looks.layers(site)
        for h in range(len(looks[site, layer][0]))
    }
    for site in looks.sites
}
figures.implicit_attention_beside(rows["gdn.attention"], rows["attn.pattern"], tokens, query=len(tokens) - 1)

# %% [markdown]
# ## Can it be read?
#
# A linear probe for each layer and head, on topics it was not fitted on, against the same probe with swapped sides, and
# corrected for all of them together. Compare with what the layers *do*, above: a side can be read where nothing hangs
# on it.

# %%
probes = probe_all(cells(pairs), pairs[best].groups, site="gdn.state", config=ProbeConfig(shuffles=19), progress=False)
print(probes)
probes.frame()[["layer", "head", "auroc", "shuffled", "selectivity", "p_adjusted", "significant"]]
