"""Measure an adapter against its base: loss, answers and task metrics.

loss          rows -> token-weighted loss
generation    prompts -> answers
answer_text   the tokens of an answer -> its text
comparison    base and adapter on the same eval rows and prompts, and a table of both
charts        losses as SVG and PNG
metrics       answers -> exact_match, accuracy, f1, chrf, bleu, rouge_l
"""
