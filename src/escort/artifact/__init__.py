"""What is written to files and read from them: converted models (docs/format.md describes theirs), and plans."""

from escort.artifact.errors import ArtifactError
from escort.artifact.load import load, load_plan
from escort.artifact.plans import export_plans, import_plans
from escort.artifact.save import save

__all__ = ["ArtifactError", "export_plans", "import_plans", "load", "load_plan", "save"]
