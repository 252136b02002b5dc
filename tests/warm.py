"""What programs import, and torch on first use: imported once, by the process that tests/programs.py forks."""

import gc

gc.disable()

import accelerate  # noqa: F401
import matplotlib.figure  # noqa: F401
import PIL.Image
import pytest  # noqa: F401
import scipy.linalg  # noqa: F401
import sklearn.datasets
import sklearn.svm  # noqa: F401
import timm  # noqa: F401
from diffusers import AutoencoderKL  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

import generate_t2i  # noqa: F401
import train_dmf  # noqa: F401
import train_t2i  # noqa: F401
from models import create_model
from models.flops import count_flops

PIL.Image.init()
count_flops(create_model("DeepFlow-Ti/2", input_size=4, depth=1, df_idxs=()))
gc.freeze()  # what is imported stays
gc.enable()
