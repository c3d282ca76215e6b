"""Evaluation: what a delta costs on a text, as predictions of the model that it gives beside those of the fine-tune.

:func:`deltafmt.analysis.evaluation.evaluate.evaluate` has the fine-tune read a text, then the base and the model that
each delta gives. The modules ``texts``, ``figures``, ``tables`` and ``page`` need neither torch nor transformers.
"""
