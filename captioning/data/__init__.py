"""Captioned pictures, from where they are found to HDF5 files and stores of features."""
