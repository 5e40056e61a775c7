"""Builders of reports."""

from __future__ import annotations

import numpy as np

from quantkit.evaluate.report import (
    Base,
    Coverage,
    Layer,
    Quant,
    Text,
    TypeLine,
    kld_histogram,
    report_json,
)

EVIL = "<script>alert('x')</script>\"&\u202e\x1b[31m\udc80"


def a_quant(path="/models/m-Q4_K.gguf", n_bytes=4_000_000, kld=0.01, *, n_layers=4, **more):
    """A quant whose figures all follow from its mean divergence."""
    tokens = kld * np.random.default_rng(n_bytes).lognormal(-0.5, 1.0, 500)
    figures = {
        "n_tokens": 500,
        "ppl": 18.0 + kld,
        "ppl_error": 0.25,
        "kld_mean": kld,
        "kld_mean_error": kld / 50,
        "kld_mean_ci": [kld * 0.9, kld * 1.1],
        "kld_median": kld / 2,
        "kld_p99": kld * 9,
        "kld_max": kld * 30,
        "same_top_p": 94.5,
        "rms_dp": 3.25,
    }
    layers = [
        Layer(layer=i, hidden_error=kld * (i + 1), router_disagreement=kld / 2 if i else None)
        for i in range(n_layers)
    ]
    return Quant(
        path=path,
        bytes=n_bytes,
        bpw=4.5,
        kld_histogram=kld_histogram(tokens),
        layers=layers,
        types=[
            TypeLine(
                role="routed_expert.up", type="Q4_K", n_tensors=3, weights=256_000, bytes=144_000
            )
        ],
        **figures | more,
    )


def a_report(quants=None, **more):
    given = {
        "model": "Tiny",
        "text": Text(corpus="core", n_tokens=21_504, n_chunks=42, n_ctx=512, digest="ab" * 32),
        "engine": "torch",
        "base": Base(ppl=18.0, ppl_error=0.25, path="/models/Tiny"),
        "constants": {"kv_cache": "f16", "threads": 2, "beta": 32.0, "exact": True},
        "quants": [a_quant()] if quants is None else quants,
        "coverage": Coverage(layers=[1, 2], counts=[[5, 0, 900], [1, 2, 3]], n_tokens=455),
    }
    return report_json(**given | more)
