"""mini-VQA: questions about drawn scenes, words and bar charts, made here; harder for a language model than easy-VQA.

Everything follows from a seed, and nothing is fetched. What is on a picture is easy to see, on purpose: each thing lies
within one of 36 squares of 16 pixels, so that a small vision tower is enough and the questions are left to the language
model, which is what gets quantized.
"""
