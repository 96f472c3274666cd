"""The quality of an adapter: loss, answers and task metrics, always beside the bare base.

loss          rows -> token-weighted loss
generation    prompts -> answers
comparison    base and adapter on the same eval rows and prompts, and the table of both
charts        losses drawn as SVG and PNG
metrics       answers -> exact_match, accuracy, f1, chrf, bleu, rouge_l
"""
