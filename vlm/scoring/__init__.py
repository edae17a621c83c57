"""What an answer is worth: pure functions from text to score, shared by every room. Standard library only.

    text.py           exact match, GQA, VQA soft accuracy, yes/no readers, word error rate, ROUGE
    choice.py         which option a reply names: strict, and as each benchmark's own script reads it
    expression.py     arithmetic in exact fractions, by a parser of our own
    answers.py        typed checker: choice, number, expression, set, grid, OCR, free text
    puzzles.py        rule scorers for number puzzles and matches (MME-Reasoning)
    boards.py         rule scorers for Sudoku, Skyscrapers, Yin-Yang, Hashi
    mme_reasoning.py  reading an answer out of a reply, scoring it, the table of results
    summary.py        per-sample scores -> the number a benchmark reports
    benchmarks.py     benchmark name -> how to score a reply and how to sum up

Nothing here executes or imports anything named by a model or a data set.
"""
