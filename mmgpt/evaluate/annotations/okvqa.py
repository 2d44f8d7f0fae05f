"""OK-VQA: the two files of VQA v2, with pictures of COCO and questions that need outside knowledge.

Its answers come with `raw_answer` as said and `answer` as stemmed; the published figures compare with `answer`.
"""

from mmgpt.evaluate.annotations import vqa

FILES = vqa.FILES
ANSWERED = vqa.ANSWERED
read = vqa.read
