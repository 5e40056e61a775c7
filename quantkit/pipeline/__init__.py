"""The story, a chapter per job: convert, calibrate, evaluate. Stages meet here and nowhere else."""

from quantkit.pipeline.conversion import Output, convert
from quantkit.pipeline.planning import Job, Planned, planned

__all__ = ["Job", "Output", "Planned", "convert", "planned"]
