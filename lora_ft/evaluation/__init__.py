"""Measure an adapter against its base: loss, answers, probabilities of labels, and task metrics.

loss          rows -> token-weighted loss
generation    prompts -> answers
comparison    base and adapter on the same eval rows and prompts, and a table of both
charts        losses as SVG and PNG
label_scores  prompts -> probabilities of labels
class_set     rows with labels, and the probabilities that a model gives them
classification  probabilities -> accuracy, F1, AUROC, calibration, with intervals
class_report  a classification as text and as a picture
metrics       answers -> exact_match, chrf, bleu, rouge_l
"""
