"""The model card of an exported folder: README.md, with the YAML header that the Hugging Face hub reads."""

import os

from huggingface_hub import ModelCardData

from models.checkpoints import TrainingData
from models.specs import TRAINING, LatentSpec

CARD = """---
{header}
---
# {name}

A {kind}, made with DeepFlow, a PyTorch reproduction of
[Deeply Supervised Flow-Based Generative Models](https://arxiv.org/abs/2503.14494).

{facts}

## Training data

{data}. The checkpoint does not record what they show or where they come from: add it here.

## Training settings

{settings}

## Sampling

In a checkout of the DeepFlow repository, after `pip install -r requirements.txt` (`USER/{name}` is the name on the hub;
a local folder works too):

```bash
python {program} --ckpt USER/{name}{weights} {condition} --grid 2x4 --out grid.png
```
{pipeline}
## Licence

{licence} The licences of the training data and of the VAE apply too.
"""
OURS = """DeepFlow's code is licensed under [CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/), and so are
these weights, unless their author says otherwise here."""
PUBLISHED = "These weights were published by others: add their licence here and at the top of this file."
PIPELINE = """
With diffusers, if that repository is installed (`pipeline.py` runs its code); the same seed gives the same images:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("USER/{name}", trust_remote_code=True)
images = pipe({condition}, generator=torch.manual_seed(0)).images
```
"""
WORDS = {  # by kind of model: description, the hub's task, program that samples it, condition on its command line
    "flow": ("class-conditional flow model", "unconditional-image-generation", "generate.py", "--classes 0"),
    "flow map": ("flow map for few-step sampling", "unconditional-image-generation", "generate.py", "--classes 0"),
    "text": ("text-to-image flow model", "text-to-image", "generate_t2i.py", '--prompts "a red bus"'),
}


def model_card(checkpoint, name, weights, has_pipeline=False):
    """README.md of the exported folder `name`. Raises InputError."""
    count = checkpoint.data_as(TrainingData).count
    kind, task, program, condition = WORDS[checkpoint.model.kind]
    call = 'prompt=["a red bus"] * 8' if program == "generate_t2i.py" else "class_labels=[0] * 8"
    library = "diffusers" if has_pipeline else "deepflow"
    licence, words = ("cc-by-nc-4.0", OURS) if checkpoint.run.get("model") else ("other", PUBLISHED)
    tags = ["deepflow", "flow-matching"]
    header = ModelCardData(license=licence, library_name=library, pipeline_tag=task, tags=tags)
    settings = {key: checkpoint.run[key] for key in TRAINING if checkpoint.run.get(key) is not None}
    return CARD.format(
        header=header.to_yaml(),
        name=name,
        kind=kind,
        facts=table(facts(checkpoint, weights)),
        data=f"{count:,} images" if count else "An unrecorded number of images",
        settings=table(settings) if settings else "The checkpoint records none.",
        program=program,
        weights=" --weights raw" * (weights == "raw"),
        condition=condition,
        pipeline=PIPELINE.format(name=name, condition=call) if has_pipeline else "",
        licence=words,
    )


def facts(checkpoint, weights):
    """{fact: text} of the card's first table."""
    options, model, steps = checkpoint.options, checkpoint.model, checkpoint.steps
    spec = checkpoint.data_as(LatentSpec)
    side = options["input_size"] * spec.factor
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sizes = f"{options['depth']} blocks of width {options['hidden_size']}, branches: {model.num_branches}"
    found = {
        "model": f"{checkpoint.run.get('model') or 'published file'}: {sizes}, {millions:.1f} M parameters",
        "weights": ("EMA" if weights == "ema" else weights) + (f", step {steps}" if steps is not None else ""),
        "images": f"{side} × {side} pixels",
        "VAE": spec.family if os.path.isabs(spec.vae) else spec.vae,
    }
    if model.kind != "text":
        names = checkpoint.data_as(TrainingData).class_names or []
        listed = ", ".join(names[:20]) + " …" * (len(names) > 20)
        found["classes"] = f"{options['num_classes']}{listed and f': {listed}'}"
    return found


def table(rows):
    """{name: value} as a markdown table."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
