"""Conditions beside text that follow a film frame by frame: audio and poses."""
