"""A DeepFlow model as a diffusers pipeline, which folders written by `python -m models.export --diffusers` load.

pipe = DiffusionPipeline.from_pretrained("deepflow-xl", trust_remote_code=True)
images = pipe(class_labels=[207, 360], generator=torch.manual_seed(0)).images
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from PIL import Image

from common.errors import InputError
from common.records import read_record
from models import load_model
from models.codec import LatentCodec
from models.hub import CONFIG_FILE
from models.specs import LatentSpec
from sampling.library import checkpoint_of, sample

OUTPUTS = ("pil", "np", "latent")
OWN = {"vae", "vae_dtype", "decode", "seed"}  # replaced by a pipeline's vae, generator and output_type


class DeepFlowTransformer(ModelMixin):
    """The network of an exported folder as a component, which diffusers loads from the subfolder `transformer`."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    @classmethod
    def from_pretrained(cls, folder, torch_dtype=None, device_map=None, **_):
        """The network of the exported folder that holds `folder`, as load_model reads it. Raises InputError."""
        parent = Path(folder).parent
        config = read_record(dict, parent / CONFIG_FILE, "export the model again")
        network, _ = load_model(parent, config.get("weights", "ema"))
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        return cls(network.to(device, torch_dtype or torch.float32))

    def save_pretrained(self, folder, **_):
        """Raises InputError: the network alone would lack the pipeline's other files."""
        raise InputError(f"{folder} is not written; copy the folder that the pipeline was loaded from")


class DeepFlowPipeline(DiffusionPipeline):
    """Generates images of classes, or of prompts with a text-to-image model, like generate.py and generate_t2i.py."""

    def __init__(self, transformer, vae):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    def __call__(
        self,
        class_labels=None,
        prompt=None,
        num_inference_steps=None,
        guidance_scale=None,
        generator=None,
        output_type="pil",
        return_dict=True,
        **settings,
    ):
        """ImagePipelineOutput with an image per class or prompt: "pil", "np" (N, R, R, 3) in [0, 1], or "latent".

        generator: only its initial seed is used, like --seed of generate.py; default: 0. settings: others of
        `sampling.sample`, such as mode="ode", except OWN. Raises InputError.
        """
        if output_type not in OUTPUTS:
            raise InputError(f"output_type {output_type!r} is unknown; choose one of {', '.join(OUTPUTS)}")
        if own := sorted(OWN & settings.keys()):
            raise InputError(f"a pipeline does not take {own[0]}; use its vae, generator or output_type instead")
        chunk = settings.get("decode_batch_size") or 32
        given = {"steps": num_inference_steps, "cfg_scale": guidance_scale, **settings}
        seed = generator.initial_seed() if generator else 0
        network = self.transformer.network
        images = sample(network, class_labels, prompts=prompt, seed=seed, decode=False, **given)
        if output_type != "latent":
            codec = LatentCodec(self.vae, checkpoint_of(network).data_as(LatentSpec))
            images = codec.decode(torch.from_numpy(images), chunk).cpu().numpy()
            images = images.astype("float32") / 255 if output_type == "np" else [*map(Image.fromarray, images)]
        return ImagePipelineOutput(images) if return_dict else (images,)
