"""From a checkpoint and a condition to batches of images."""

import contextlib
import functools
import itertools

import torch

from common.errors import InputError
from common.flags import shown
from common.look_ahead import ordered_map
from common.precision import DTYPES
from models import PRESETS, load_checkpoint
from models.codec import LatentCodec
from models.compiling import compile_blocks
from models.paths import PATHS
from models.specs import LatentSpec, recognise_vae
from samplers import BranchVelocity, GuidedVelocity, integrate, sample_noise


class ImageSampler:
    """A checkpoint ready to sample with the settings of a resolved SamplingFlags. Raises InputError.

    make_condition: (config, Checkpoint, device) → condition, as `ClassLabels`; load_codec: as LatentCodec.load.
    checkpoint: that of --ckpt if it has been read already; its weights are then not hashed, as no manifest is written.
    """

    def __init__(self, config, make_condition, device, checkpoint=None, load_codec=LatentCodec.load):
        self.device, self.load_codec = device, load_codec
        self.checkpoint, self.path, self.spec = open_checkpoint(config, checkpoint)
        model = self.checkpoint.model
        self.config = config = config.for_model(model.kind, model.num_branches)
        options = self.checkpoint.options
        self.shape = (options["in_channels"], options["input_size"], options["input_size"])
        self.condition = make_condition(config, self.checkpoint, device)
        self.times = config.sampler.times(config.num_steps, config.shift)
        self.ends = model.ends if config.branch_settings() else None  # None: only the last branch is used
        self.cost, self.draws = self.try_out()
        if config.decode:
            # a checkpoint that is already loaded comes from sampling/library.py, which needs the codec in any case
            found = None if checkpoint else recognise_vae(config.vae or self.spec.vae, self.spec)
            self.spec = found.scaled_as(self.spec) if found else self.codec.spec
        # of the weights in the file, before they are rounded to --dtype
        self.weights_sha256 = None if checkpoint else self.checkpoint.weights_sha256()
        model.to(device, DTYPES[config.dtype])
        if config.compile:
            compile_blocks(model)
        velocity = model.velocities if self.ends else model.velocity
        self.network = model.average_velocity if config.sampler.is_map else velocity

    @functools.cached_property
    def codec(self):
        """The LatentCodec, None with --no-decode. Loaded on first use, as that takes seconds."""
        config = self.config
        if not config.decode:
            return None
        codec = self.load_codec(config.vae or self.spec.vae, self.device, DTYPES[config.vae_dtype])
        return codec.fit(self.spec, config.ckpt)

    def latents(self, indices, noise):
        """Latents (N, C, h, w), float32, of the images `indices`; noise: iterator of their draws, on the device."""
        velocity = self.velocity(self.network, *self.condition.of(indices))
        step = self.config.sampler.step(self.path, lambda _: next(noise))
        return integrate(step, velocity, next(noise), self.times).float()

    def velocity(self, network, y, y_null):
        """The velocity function that the steps of a batch call."""
        arguments = network, y, y_null, self.config.guidance, DTYPES[self.config.dtype]
        if self.ends is None:
            return GuidedVelocity(*arguments)
        return BranchVelocity(*arguments, options=self.config.branches, ends=self.ends)

    def try_out(self):
        """(GuidedVelocity that counted its calls, number of noise arrays) of a batch, from sampling a scalar."""
        zero, y, asked = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long), []

        def noise(index):
            asked.append(index)
            return zero

        def network(x, *arguments):
            return [x] * len(arguments[-1]) if self.ends else x

        velocity = self.velocity(network, y, y)
        integrate(self.config.sampler.step(self.path, noise), velocity, zero, self.times)
        return velocity, 1 + len(asked)

    def batches(self, batches):
        """Yield (indices, wait) for every batch; wait() → uint8 images (N, R, R, 3), float32 latents with --no-decode.

        The batch is only queued on the GPU. Call wait() in another thread, so that the next batch is computed
        meanwhile; it raises InputError if values are not finite.
        """
        noise = batch_noise(self.config.global_seed, batches, self.draws, self.shape, self.device)
        with contextlib.closing(noise):
            for indices in batches:
                rows = self.latents(indices, noise)
                finite = [rows.isfinite().all()]
                if self.codec is not None:
                    rows, decoded = self.codec.start_decoding(rows, self.config.decode_batch_size)
                    finite.append(decoded)
                yield indices, functools.partial(self.finish, indices, *start_copy(rows, *finite))

    def finish(self, indices, copied, copies):
        """Images or latents of `indices`, as a checked array; copied, copies: from `start_copy`. Raises InputError."""
        if copied is not None:
            with torch.cuda.device(self.device):  # a thread begins on GPU 0, and would take memory there
                copied.synchronize()
        rows, finite, *decoded = copies
        if not finite:
            remedy = "the weights are damaged or diverged" if self.config.dtype == "fp32" else "try --dtype fp32"
            which = f"images {indices[0]}..{indices[-1]}"
            raise InputError(f"{self.config.ckpt} gives samples that are not finite ({which}); {remedy}")
        if decoded:
            self.codec.check(*decoded)
        return rows.numpy()


def start_copy(*tensors):
    """Copy tensors of one device to the host → (CUDA event of the end or None, copies); does not wait for a GPU."""
    if not tensors[0].is_cuda:
        return None, [tensor.cpu() for tensor in tensors]
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
    copied = torch.cuda.Event(blocking=True)  # a waiting thread sleeps instead of spinning
    copied.record(torch.cuda.current_stream(tensors[0].device))  # which need not be the current device
    return copied, copies


def open_checkpoint(config, checkpoint=None):
    """(Checkpoint, its path, LatentSpec of its data) of --ckpt. Raises InputError if flags contradict the file."""
    checkpoint = checkpoint or load_checkpoint(config.ckpt, config.weights, **config.model_options())
    check_model(config, checkpoint)
    if config.cfg_scale != 1.0 and checkpoint.model.kind != "flow map" and checkpoint.run.get("cfg_prob") == 0:
        fault = f"{config.ckpt} has no null class, it was trained with --cfg-prob 0"
        raise InputError(f"--cfg-scale {config.cfg_scale}: {fault}; pass --cfg-scale 1")
    spec = checkpoint.data_as(LatentSpec)
    if config.decode and (made := checkpoint.options["in_channels"]) != spec.channels:
        fault = f"{config.ckpt} makes latents of {made} channels, but its VAE {spec.vae} decodes {spec.channels}"
        raise InputError(f"{fault}; pass --no-decode")
    path_type = checkpoint.run.get("path_type") or config.path_type or "linear"
    answers = {
        "path_type": path_type,
        "resolution": checkpoint.options["input_size"] * spec.factor,
        "qk_norm": bool(checkpoint.options["qk_norm"]),
    }
    for name, answer in answers.items():
        given = getattr(config, name)
        if given not in (None, answer):
            raise InputError(f"{shown(name)} {given} contradicts {config.ckpt}, which has {answer}")
    return checkpoint, PATHS[path_type], spec


def check_model(config, checkpoint):
    """Raise InputError if --model does not fit the checkpoint."""
    own, options = checkpoint.run.get("model"), checkpoint.options
    if config.model in (None, own):
        return
    preset = PRESETS[config.model]
    depth = config.trans_depth or preset.depth
    expected = (preset.kind, depth, preset.hidden_size, preset.patch_size, bool(preset.df_idxs))
    sizes = (options["depth"], options["hidden_size"], options["patch_size"])
    if own or expected != (checkpoint.model.kind, *sizes, bool(options["df_idxs"])):
        held = own or "depth {depth}, width {hidden_size}, key layers {df_idxs}".format(**options)
        raise InputError(f"--model {config.model} contradicts {config.ckpt}, which holds {held}")


def batch_noise(seed, batches, draws, shape, device):
    """Yield noise (N, *shape), float32 on the device, in the order of use: all draws of a batch, then the next batch's.

    batches: image indices of each. The next noise is drawn in a thread while the network works.
    """

    def draw(which):
        indices, number = which
        noise = sample_noise(seed, indices, number, shape)
        return noise.pin_memory() if device.type == "cuda" else noise

    for noise in ordered_map(draw, itertools.product(batches, range(draws))):
        yield noise.to(device, non_blocking=True)
