"""Files of tensors: written whole, and read without running what is in them."""

import argparse
import pickle
import zipfile
from pathlib import Path

import torch

from captioning.run.files import atomic_path
from captioning.run.messages import UserError


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (tensors and plain values only), atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer hides what went wrong with the file
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load_tensors(path, read_modules=None):
    """Read a file of tensors and plain values on the CPU; code in it is never run.

    :param read_modules: function of the path, for a file that holds more than that; or None
    :raises UserError: if it is missing, damaged, or would need to run code
    """
    try:
        if zipfile.is_zipfile(path):  # torch.save compresses nothing: its members fit into the file
            with zipfile.ZipFile(path) as archive:
                claimed = sum(member.file_size for member in archive.infolist())
            if claimed > Path(path).stat().st_size:
                raise ValueError(f"it would become {claimed:,} bytes")
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # kept by many trainings
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not read_modules:
                raise
            return read_modules(path)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zip, pickle and torch each fail in many ways on damaged bytes
        raise UserError(
            f"{path} is no checkpoint: expected a file of tensors as train.py writes it. This one "
            "is damaged, of another kind, or holds code, which is never run"
        ) from error
