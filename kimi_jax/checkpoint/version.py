"""The version of the checkpoint format: training's and the converter's are one."""

FORMAT_VERSION = 1
