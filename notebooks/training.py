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
# # Training a behaviour in
#
# A direction that causes a behaviour can be added at every run, or the behaviour can be trained into the weights. This
# notebook does the second, in the order that the suite insists on: first a verdict, then a short training with APOLLO
# against frozen contexts and a quarter of general data, then a look at what moved, and at where the gradient went.

# %%
from analysis import figures
from analysis.figures import LivePlot
from analysis.gradients import GradientConfig, gradients
from analysis.updates import snapshot, updates
from probes.behaviors import read_behavior
from probes.errors import WrongInput
from probes.model import load
from probes.propensity import generate
from probes.verify import GateConfig, verify
from training.config import TrainConfig
from training.trainer import train

model = load("organism")
behavior = read_behavior("follow-direction")
print(model, behavior, sep="\n")

# %% [markdown]
# ## First the verdict
#
# `train` starts only with a PASS for this behaviour and these very weights.

# %%
try:
    train(model, behavior)
except WrongInput as refusal:
    print(refusal)

# %%
verdict = verify(model, behavior, GateConfig(layers=(4,)), progress=False)
print(verdict)

# %% [markdown]
# ## Where would the gradient go?
#
# With a frozen context the memory of the prompt stands still, and only the answer's own tokens bring gradient. So the
# query projections, which look at the memory, learn almost as they would with the whole context, and those that write
# it do not: the cosine tells how like the two gradients are.

# %%
where = gradients(model, behavior, GradientConfig(batches=4), progress=False)
for answer in where.answers:
    print(f"- {answer.sentence}")

# %% [markdown]
# ## Then the training
#
# 200 examples drawn from the grammar's training side, a quarter of each batch from the organism's abilities. What is
# asked in between is held out: other names, other templates, other combinations.

# %%
asked = [item.prompt(model) for item in behavior.items[:96:16]]
said_before = generate(model, asked, max_new_tokens=14)
before = snapshot(model)
done = train(
    model,
    behavior,
    TrainConfig(steps=40, questions=96),
    verdict=verdict,
    out="runs/notebook-training",
    watch=LivePlot(),
    progress=False,
)

# %%
print(done.table())
print(done.sentence)

# %%
for item, one, two in zip(behavior.items[:96:16], said_before, generate(model, asked, max_new_tokens=14), strict=True):
    print(item.messages[-1]["content"], f"  before: {one}", f"  after:  {two}", sep="\n")

# %%
drawn = figures.draw_training(done, gradients=where)
drawn["abilities"]

# %%
drawn["gradient-cosines"]

# %% [markdown]
# ## What moved in the weights
#
# Updates that are small and sparse, or of low rank, can be written while the same weights are being served.

# %%
moved = updates(before, snapshot(model)).frame()
moved

# %% [markdown]
# The trained model is a folder like any other: `dispositions compare organism runs/notebook-training/model --behavior
# follow-direction` asks whether its states moved along the behaviour's direction.
