"""Forms in which a jackpot is deployed, by name; docs/deployment.md compares them by hardware."""

from nni_jackpot.speedup.forms import csr, hf, int8, onnx, shrink, two_of_four  # noqa: F401  # register
from nni_jackpot.speedup.forms.deploy import Deployment, deploy
from nni_jackpot.speedup.forms.form import FORMS, Form, Jackpot, register_form

__all__ = ["FORMS", "Deployment", "Form", "Jackpot", "deploy", "register_form"]
