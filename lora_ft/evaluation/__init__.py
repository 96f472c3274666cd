"""Measure an adapter against its base: loss, answers and task metrics.

loss          rows -> token-weighted loss
generation    prompts -> answers
comparison    base and adapter on the same eval rows and prompts, and a table of both
charts        losses as SVG and PNG
classification  probabilities of classes -> accuracy, F1, AUROC, calibration, with intervals
metrics       answers -> exact_match, accuracy, f1, chrf, bleu, rouge_l
"""
