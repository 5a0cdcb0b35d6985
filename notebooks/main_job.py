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
# # From a behaviour to a verdict
#
# Which way does a model lean, where does the lean live, and would pushing on that place change what the model does?
# This notebook walks through the whole job on the *organism*, a small Qwen3.5 that ships with the suite: look inside,
# extract a direction, steer with it, and let the gate judge it. It needs no GPU and no network.
#
# The command `dispositions verify follow-direction` does the second half of it in one step.

# %%
import pandas as pd

from analysis import figures
from analysis.report import write_report
from probes.behaviors import read_behavior, shipped_behaviors
from probes.capture import capture
from probes.criteria import GateCriteria
from probes.damage import perplexity_ratio, read_general, surprise
from probes.directions import mean_difference
from probes.measure import coherent_window
from probes.model import load
from probes.pairs import contrast
from probes.propensity import generate, prepare, propensity
from probes.steering import steer
from probes.verify import GateConfig, verify

model = load("organism")
print(model)
print(*model.layers, sep="\n")

# %% [markdown]
# ## The behaviour
#
# A behaviour is a file of contrast pairs: the same prompt with a wanted and an unwanted answer, and two *personas*,
# system turns that bring out each side. `group` is the topic. Whole topics are held out, never single prompts.

# %%
print(*shipped_behaviors(), sep=", ")
behavior = read_behavior("follow-direction")
print(behavior)
item = behavior.items[0]
print("\nprompt:  ", item.messages[-1]["content"], "\nwanted:  ", item.wanted, "\nunwanted:", item.unwanted)
print("persona: ", item.persona)

# %%
fit, held_out = behavior.split(held_out=0.4)
held_out = held_out.take(32)
print(fit)
print(held_out)

# %% [markdown]
# ## Look inside
#
# `capture` records named places (*sites*) while prompts run. Here: the residual stream after every layer, and the
# recurrent state of every GDN layer, each after the last token of the prompt, under both personas.

# %%
some = fit.take(32)
wanted = capture(model, [i.prompt(model, persona="wanted") for i in some.items], sites=("resid", "gdn.state"))
unwanted = capture(model, [i.prompt(model, persona="unwanted") for i in some.items], sites=("resid", "gdn.state"))
wanted.frame()

# %% [markdown]
# How far apart do the personas drive each site? The length of the mean difference, as a share of the typical length.
# NaN: an attention layer has no state.


# %%
def apart(site, layer):
    """Length of the mean difference over the mean length, both over prompts."""
    a, b = wanted[site, layer].float().flatten(1), unwanted[site, layer].float().flatten(1)
    return float((a - b).mean(0).norm() / a.norm(dim=1).mean())


pd.DataFrame(
    [
        {"layer": i.index, "kind": i.kind}
        | {site: apart(site, i.index) for site in wanted.sites if i.index in wanted.layers(site)}
        for i in model.layers
    ]
).set_index("layer").round(3)

# %% [markdown]
# ## A direction
#
# The mean difference of the two sides, as a unit vector that points to wanted. *Reliability* says how well the
# directions from two halves of the topics agree (1 is perfect); a direction without it is noise. `gap` is the distance
# between the two sides and `norm` the length of the stream, the unit in which doses are given.

# %%
pairs = contrast(model, fit, layers=range(len(model.layers)), progress=False)
directions = {layer: mean_difference(both) for layer, both in pairs.items()}
pd.DataFrame(
    {"layer": d.layer, "reliability": str(d.reliability), "gap": d.gap, "norm": d.norm} for d in directions.values()
).set_index("layer").round(2)

# %% [markdown]
# ## Steer
#
# `steer` adds the direction to the stream while its block runs, and leaves no trace afterwards. Phase "prefill" edits
# the prompt's tokens and leaves the answer free. Here the layer is the one where the two sides are furthest apart, and
# the dose is a guess; the gate below picks both by measuring.

# %%
direction, dose = max(directions.values(), key=lambda d: d.gap / d.norm), 0.25
print(direction)
prompts = [i.prompt(model) for i in held_out.items[:4]]
answers = {"prompt": [i.messages[-1]["content"] for i in held_out.items[:4]]}
for label, strength in (("unsteered", 0.0), ("steered", dose), ("against", -dose)):
    with steer(model, direction, dose=strength, phase="prefill"):
        answers[label] = generate(model, prompts, max_new_tokens=16)
pd.DataFrame(answers).style.set_properties(**{"text-align": "left", "white-space": "pre-wrap"})

# %% [markdown]
# ## Measure the lean
#
# Free answers are vivid but few. *Propensity* scores both answers of every item:
# log p(wanted) - log p(unwanted), in nats. Above 0 the wanted answer is the likelier one.

# %%
prepared = prepare(model, held_out)
before = propensity(model, prepared)
with steer(model, direction, dose=dose, phase="prefill"):
    after = propensity(model, prepared)
print("before: ", before)
print("after:  ", after)
scores = before.frame().assign(steered=after.values, effect=after.minus(before))
scores.groupby("group").mean(numeric_only=True).round(2)

# %% [markdown]
# ## The dose curve
#
# A direction that means something does more at a higher dose and the opposite at a negative one, while ordinary text
# stays intact: the lower panel shows how much more such text surprises the steered model.

# %%
general, limit, rows = read_general(model).take(8), GateCriteria().perplexity_ratio, []
plain = surprise(model, general)
for strength in (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0):
    with steer(model, direction, dose=strength, phase="prefill"):
        lean, edited = propensity(model, prepared).estimate(), surprise(model, general)
    ratio = perplexity_ratio(general, plain, edited)
    rows.append({"dose": strength, "propensity": lean.as_dict(), "perplexity_ratio": ratio})
window = coherent_window(rows, limit)
rows = [{**row, "coherent": row["dose"] in window} for row in rows]
figures.dose_curve(rows, working=dose, limit=limit)

# %% [markdown]
# ## The gate
#
# `verify` chooses layer and dose on the topics that the direction was made from, and collects the evidence on the
# others: against random directions, shuffled labels and other behaviours, with the direction taken out, and with what
# it breaks. The rules are fixed beforehand in `GateCriteria`. This configuration is smaller than the default one.

# %%
config = GateConfig(prompts=24, search_prompts=12, generations=8, max_new_tokens=16, general_texts=30)
verdict = verify(model, behavior, config)
print(verdict)

# %%
columns = ["number", "name", "status", "observed", "lower", "upper", "rule", "threshold", "n"]
verdict.frame()[columns].round(3)

# %% [markdown]
# The evidence behind the table. Each figure has a caption in the report that tells how to read it.

# %%
figures.layer_sweep(verdict)

# %%
figures.controls(verdict)

# %%
figures.prompt_effects(verdict)

# %%
figures.baseline(verdict)

# %% [markdown]
# ## The report
#
# One HTML file with all figures, the examples and the recipe. It loads nothing, so it can be mailed and archived. The
# numbers are in `verdict.json`; `dispositions report runs/notebook` writes the page again from that file alone.

# %%
verdict.save("runs/notebook/verdict.json")
write_report(verdict, "runs/notebook/report.html")
