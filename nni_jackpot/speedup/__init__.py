"""Conversion of jackpots to smaller or faster models; docs/deployment.md compares the forms by hardware."""

from nni_jackpot.speedup.channels import shrink
from nni_jackpot.speedup.csr import sparse_csr
from nni_jackpot.speedup.forms import Deployment, Form, Jackpot, deploy, register_form
from nni_jackpot.speedup.onnx import export_onnx, quantize_onnx
from nni_jackpot.speedup.semi_structured import check_semi_structured, semi_structured

__all__ = [
    "Deployment",
    "Form",
    "Jackpot",
    "check_semi_structured",
    "deploy",
    "export_onnx",
    "quantize_onnx",
    "register_form",
    "semi_structured",
    "shrink",
    "sparse_csr",
]
