"""InceptionV3 of 2015-12-05 as ADM's evaluator uses it, through torch-fidelity's extractor, and the Inception Score."""

import os

import torch

from common.errors import InputError
from models.checkpoints import read_file
from models.hub import fetching

SPATIAL_CHANNELS = 7  # of the 192 that branch1x1 of the fifth block of size 17 has


def load_network(weights=None, features=("2048",)):
    """torch-fidelity's network: uint8 (N, 3, H, W) → features; weights: a file, None to download. Raises InputError."""
    # seconds to import, as all of torchvision comes with it, and not every command needs the network
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    remedy = f"download {URL_INCEPTION_V3} and pass the file with --inception-weights"
    source = weights or os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(URL_INCEPTION_V3))
    if weights or os.path.exists(source):  # torch-fidelity unpickles it without verifying it
        state = read_file(source)
        if not isinstance(state, dict) or getattr(state.get("fc.weight"), "shape", None) != (1008, 2048):
            raise InputError(f"{source} holds another network; {remedy}")
    with fetching(f"InceptionV3 {source}", source, remedy, URL_INCEPTION_V3):
        return FeatureExtractorInceptionV3("inception-v3-compat", list(features), weights)


class Inception:
    """uint8 (N, 3, H, W) → {"pool": (N, 2048), "spatial": (N, 2023)}, float32.

    Spatial features: the ReLU output of Mixed_6d.branch1x1 (TF: mixed_6/conv), its first 7 channels, flattened in the
    order (row, column, channel). classifier (2048, 1008): weights of the Inception Score's logits, without bias.
    """

    name = "inception-2015-12-05"

    def __init__(self, weights=None, device="cpu"):
        self.network = load_network(weights).to(device)
        self.classifier = self.network.fc.weight.T
        self.network.Mixed_6d.branch1x1.register_forward_hook(self.keep_spatial)

    def keep_spatial(self, _module, _inputs, output):
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, images):
        (pool,) = self.network(images)
        return {"pool": pool, "spatial": self.spatial}


def inception_score(features, classifier, split_size=5000, splits=None, chunk=512):
    """Mean over consecutive splits of exp(mean KL(p(y|x) ‖ p(y))) (Salimans et al. 2016), without a shuffle.

    features (N, D), classifier (D, K). Splits are ADM's, of split_size rows, the last of what is left (it counts as
    much), or `splits` of equal size, as Salimans et al. have ten. log_softmax in float64: no probability underflows.
    """
    scores = []
    ends = [number * len(features) // splits for number in range(1, splits)] if splits else None
    for split in features.split(split_size) if ends is None else features.tensor_split(ends):
        log_p = torch.cat([(part.double() @ classifier.double()).log_softmax(dim=1) for part in split.split(chunk)])
        log_mean = log_p.logsumexp(dim=0) - torch.tensor(float(len(log_p)), dtype=torch.float64).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()
