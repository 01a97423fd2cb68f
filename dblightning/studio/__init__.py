"""A page to try blends by hand: sliders, scores, a Pareto map, presets to take away; see docs/studio.md.

``python -m dblightning studio`` opens it. Needs the extra ``studio``.
"""
