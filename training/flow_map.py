"""What a flow map's training starts from: a flow model, a flow map, or random weights; and the teacher of a guide."""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from common.errors import InputError, note
from common.processes import device_of_process
from common.records import check_record
from loss import GuidedTarget
from models import PRESETS, create_model, model_config
from models.attention import set_attention
from models.checkpoints import find_checkpoint
from models.compiling import compile_blocks
from models.flow_map import FlowMap, to_flow_map
from models.hub import is_on_hub
from training import checkpoint as run_checkpoint
from training.start import SIZES, check_arguments, load_source

TOLERANCE = 1e-4  # of u(x, t, t, y) against the flow model's velocity


def start(config, info, resumed):
    """Constructor arguments of the run's flow map, and the flow map; resumed: the run's own checkpoint, or None."""
    set_attention(config.attn_func)
    torch.manual_seed(config.seed)  # of the log-variance head, or of all weights
    if resumed:
        model, options = start_from_file(resumed, config, info, "resume")
    elif config.from_scratch:
        flags = {**config.model_flags(), "qk_norm": "rms" if config.qk_norm else False}
        options = model_config(config.model, **flags, **info.model_options())
        model = create_model(config.model, **options)
    elif config.init_from:
        model, options = start_from_file(config.init_from, config, info, "init-from")
    else:
        raise InputError("--init-from is missing: name the flow model to start from, or pass --from-scratch")
    model.supervise_branches(config.deep_supervision)
    if config.compile:
        model.compile_derivative()
    return options, model


def start_from_file(path, config, info, name):
    """The flow map of a file and its constructor arguments; name: the flag that gave `path`, init-from or resume."""
    checkpoint, source = load_flow(path, config, info, name), f"--{name} {path}"
    check_preset(config, checkpoint.options, source)
    own = checkpoint.options.get("dmf_depth")
    if name == "resume" and checkpoint.model.kind != FlowMap.kind:
        raise InputError(f"{source} is a flow model; start a run from it with --init-from")
    if own and "model_options" in checkpoint.run and config.dmf_depth not in (None, own):
        raise InputError(f"--dmf-depth {config.dmf_depth} contradicts {source}, a flow map with {own}")
    if name == "init-from" and config.g_type == "mg" and config.cfg_prob == 0 == checkpoint.run.get("cfg_prob"):
        raise InputError(f"--g-type mg needs a null class, which --cfg-prob 0 never trains, nor did {source}; raise it")
    depth = config.dmf_depth or own or PRESETS[config.model].dmf_depth
    add_qk_norm = name == "init-from" and bool(config.qk_norm) and not checkpoint.options["qk_norm"]
    model, options = to_flow_map(checkpoint.options, checkpoint.model.state_dict(), depth, add_qk_norm)
    if name == "init-from":
        check_conversion(checkpoint.model, model, add_qk_norm)
    return model, options


def load_flow(path, config, info, name):
    """Checkpoint of a flow model, checked against the data; name: the flag that gave `path`. Raises InputError."""
    flags = {"df_idxs": config.df_idxs, "legacy_scaling": config.legacy_scaling}
    checkpoint = load_source(path, config, info, name, **flags)
    check_arguments(f"--{name} {path}", checkpoint.options, info.model_options())
    return checkpoint


def check_preset(config, options, source):
    """Raise InputError if --model or its flags name another network than the file `source` (with its flag) holds."""
    preset = PRESETS[config.model]
    sizes = {"depth": config.trans_depth or preset.depth, **{key: getattr(preset, key) for key in SIZES}}
    check_arguments(source, options, sizes)
    if bool(options["df_idxs"]) != bool(preset.df_idxs):
        kind = "DeepFlow-DMF" if options["df_idxs"] else "DMFT"
        raise InputError(f"{source} has key layers {options['df_idxs']}; choose a {kind} preset")
    if config.qk_norm is False and options["qk_norm"]:
        raise InputError(f"--no-qk-norm contradicts {source}, which has a QK norm; drop the flag")


@torch.no_grad()
def check_conversion(flow, model, changed, n=4):
    """Note how far u(x, t, t, y) is from the flow model's velocity on a batch of n; InputError if too far.

    changed: a QK norm was added, which makes them differ. Both models are moved to this process's device, where
    training needs the flow map and large networks are fast.
    """
    device, g = device_of_process(), torch.Generator().manual_seed(0)
    flow, model = flow.to(device), model.to(device)
    side = int(model.pos_embed.shape[1] ** 0.5) * model.patch_size
    x, t = torch.randn(n, model.in_channels, side, side, generator=g), torch.rand(n, generator=g)
    x, t, y = (part.to(device) for part in (x, t, torch.arange(n) % (model.num_classes + 1)))
    v = flow.velocity(x, t, y)
    difference = ((model.average_velocity(x, t, t, y) - v).abs().max() / v.abs().max().clamp_min(1e-12)).item()
    note(f"u(x, t, t, y) is the flow model's velocity up to a relative difference of {difference:.1e}")
    if changed:
        note("--qk-norm adds a norm that --init-from lacks: training starts from another function than the flow model")
    elif not difference <= TOLERANCE:
        raise InputError("--init-from is converted wrongly: u(x, t, t, y) is not its velocity; use another file")


def guided_target(run):
    """The GuidedTarget of --g-type. Raises InputError for a teacher that does not fit."""
    config, source = run.config, run.model
    if config.g_type == "distill":
        teacher = load_teacher(run)
        if teacher.run.get("cfg_prob") == 0 and config.omega != 1:
            fault = f"--teacher {config.teacher} has no null class, it was trained with --cfg-prob 0"
            raise InputError(f"{fault}; pass --omega 1")
        source = teacher.model.to(run.accelerator.device)
        if config.compile:
            compile_blocks(source)
    return GuidedTarget(config.g_type, config.omega, source.velocity, run.info.num_classes)


def load_teacher(run):
    """Checkpoint of --teacher, the same on all processes and at every start of the run. Raises InputError.

    A run's folder means its newest checkpoint when this run began; the file and a hash of its weights are recorded.
    """
    config, found = run.config, [None, None]
    if run.accelerator.is_main_process:
        source = recorded_teacher(run)
        found = [source.file, source.sha256] if source else [str(find_checkpoint(config.teacher, "--teacher")), None]
    file, sha256 = broadcast_object_list(found)
    fault, remedy = f"--teacher {config.teacher}: {file}", "restore it, or pass another --teacher with --allow-changes"
    if sha256 and not (Path(file).exists() or is_on_hub(file)):
        raise InputError(f"{fault}, which this run began with, is gone; {remedy}")
    teacher = load_flow(file, config, run.info, "teacher")
    run.sources["teacher_source"] = now = run_checkpoint.Source(file, teacher.weights_sha256())
    if sha256 not in (None, now.sha256):
        raise InputError(f"{fault} has other weights than when this run began; {remedy}")
    return teacher


def recorded_teacher(run):
    """The Source of the teacher in the checkpoint to resume; None if it has none, or the flags name another teacher."""
    if run.resumed is None:
        return None
    before = run_checkpoint.read(run.resumed, run.info).config
    if any(before.get(name) != getattr(run.config, name) for name in ("teacher", "weights", "convention")):
        return None
    return check_record(run_checkpoint.Settings, before, run.resumed, run_checkpoint.REMEDY).teacher_source
