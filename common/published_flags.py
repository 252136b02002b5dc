"""Flags of the published repositories (DeepFlow, SiT, REPA, Decoupled MeanFlow) that are not ours; unknown flags.

A key is a flag, or a flag with one of its values (`--last-step=Mean`). A flag that a program declares itself keeps its
own meaning, unless a table lists its value. docs/coming_from.md lists the numerical differences.
"""

import difflib

from common.errors import TYPED, InputError, note

OURS = {  # our flag, or flag and value; used only if the program has that flag
    # SiT
    "ODE": "--mode=ode",
    "SDE": "--mode=sde",
    "--data-path": "--data-dir",
    "--results-dir": "--output-dir",
    "--image-size": "--resolution",
    "--global-batch-size": "--batch-size",
    "--global-seed": "--seed",
    "--ckpt-every": "--checkpointing-steps",
    "--sample-every": "--sampling-steps",
    "--wandb": "--report-to=wandb",
    "--num-sampling-steps": "--num-steps",
    "--sampling-method=heun": "--heun",
    "--sampling-method=Heun": "--heun",
    "--path-type=Linear": "--path-type=linear",
    "--path-type=GVP": "--path-type=cosine",
    "--prediction=velocity": "--prediction=v",
    # Decoupled MeanFlow
    "--torch-compile": "--compile",
    "--wandb-dir": "--logging-dir",
    "--g-min": "--guidance-low",
    "--g-max": "--guidance-high",
    "--create-npz": "--format=both",
    "--no-create-npz": "--format=png",
    # DeepFlow
    "--ema-param": "--ema-decay",
}
TRAINING, SAMPLING, MEASURING = "--init-from", "--cfg-scale", "--metrics"  # the flags that tell a program's kind
SWITCHES = ("--legacy", "--no-legacy")  # in UNUSED; they take no value
BOTH = {"--loss-weight=None": "the loss has no weight over time", "--attn-func": "torch chooses the kernel"}
UNUSED = {  # by kind of program: flags that are ignored, with a note on why nothing is lost
    TRAINING: {**BOTH, "--project-name": "W&B's project is called deepflow; --exp-name names the run"},
    SAMPLING: {
        **BOTH,
        **dict.fromkeys(("--sampling-method=Euler", "--sampling-method=euler"), "steps are Euler's without --heun"),
        "--last-step=Mean": "the last step adds no noise",
        "--last-step-size=0.04": "that is the last step of --mode sde",
        **dict.fromkeys(("--diffusion-form=sigma", "--diffusion-norm=1.0"), "--mode sde has it on the linear path"),
        "--prediction=velocity": "networks predict the velocity",
        "--encoder-depth": "it is inferred from the file's weights",
        **dict.fromkeys(SWITCHES, "files in REPA's first format are recognised by the names of their weights"),
    },
    MEASURING: {"--workers": "images are read ahead without it"},
}
TIMES = dict.fromkeys(("--train-eps", "--sample-eps"), "times run from 0 to 1; leave it out")
REFUSED = {  # by kind of program: flags that are rejected, with the remedy
    TRAINING: {
        **TIMES,
        "--loss-weight": "choose the distribution of t with --weighting instead",
        "--ckpt": "resume a run with --resume; start from the weights of a file, ours or published, with --init-from",
        "--cfg-scale": "sample grids of a run are not guided; pass it to generate.py",
    },
    SAMPLING: {
        **TIMES,
        "--sampling-method": "steps are Euler's, or Heun's with --mode ode --heun; choose --num-steps",
        **dict.fromkeys(("--atol", "--rtol"), "steps are fixed; choose --num-steps"),
        **dict.fromkeys(("--diffusion-form", "--diffusion-norm"), "the diffusion of --mode sde is 2t; leave it out"),
        **dict.fromkeys(("--last-step", "--last-step-size"), "--mode sde ends with a noiseless step of 0.04; omit it"),
        **dict.fromkeys(("--reverse", "--likelihood"), "generate.py only samples; leave it out"),
        "--prediction": "networks predict the velocity; leave it out",
        "--loss-weight": "it belongs to training; leave it out",
        "--ema-param": "choose EMA or raw weights with --weights",
    },
}


def translate(words, own, also):
    """Translate a command line into the program's own flags; also: {other name of a flag: its name}. Raises InputError.

    For an unknown flag, the error suggests the program's closest one. Messages show the names that were typed.
    """
    TYPED.clear()
    unused, refused = (
        {key: text for kind in own & table.keys() for key, text in table[kind].items()} for table in (UNUSED, REFUSED)
    )
    names = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--data-path" in names and "--weighting" in own - names:  # SiT's training has no such flag
        note("--weighting uniform is assumed with --data-path, as in SiT; --data-dir DATA takes the default")
        words = [*words, "--weighting=uniform"]
    if "--dry-run" in names:  # published scripts leave --data-dir for the user to fill in
        unused["--data-dir="] = "a dry run needs no data"
    ours = {theirs: name for theirs, name in OURS.items() if name.partition("=")[0] in own} | also | {n: n for n in own}
    result, dropping = [], False
    for index, word in enumerate(words):
        if word == "--":
            return result + words[index:]
        if word.startswith("--") or (index == 0 and word in ours):
            taken, dropping = take(word, words[index + 1 : index + 2], ours, unused, refused)
            result += taken
        elif not dropping:
            result.append(word)
    return result


def take(word, following, ours, unused, refused):
    """(our arguments for a flag, whether to drop the arguments that follow it, its values)."""
    typed, separator, value = word.partition("=")
    name = typed.replace("_", "-")
    full = f"{name}={value}" if separator else "=".join([name, *following])
    for key, rest in ((full, ""), (name, separator + value)):
        if key in ours:
            TYPED[ours[key].replace("=", " ")] = typed if key == name else " ".join([typed, value or following[0]])
            return [ours[key] + rest], key != name and not separator
        if key in unused:
            note(f"{typed} is unused: {unused[key]}")
            return [], not separator and key not in SWITCHES
    if " " in word:  # a text that begins with dashes
        return [word], False
    if name in refused:
        raise InputError(f"{typed} is not supported: {refused[name]}")
    known = [flag for flag in sorted(ours) if "=" not in flag]
    longer = [flag for flag in known if flag.startswith(name)]
    close = difflib.get_close_matches(name, longer or known, 1, 0 if longer else 0.7)
    close = [f"did you mean {ours[flag].replace('=', ' ')}?" for flag in close]
    raise InputError(" ".join([f"{typed} is unknown;", *close, "--help lists all flags"]))
