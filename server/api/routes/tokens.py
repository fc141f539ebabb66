"""`/tokenize`, `/detokenize`, `/tokenizer_info`: the model's tokenizer, for those who count or score tokens."""

from __future__ import annotations

from fastapi import APIRouter, Response

from server.api.prompts import conversation, encode, message_dicts
from server.api.replies import ERRORS, JSONReply, Text, TokenizerInfo, Tokens
from server.api.sampling import check_ids
from server.api.schemas import DetokenizeRequest, TokenizeRequest
from server.api.service import Service
from server.errors import RequestError


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", responses={200: {"model": Tokens}, **ERRORS})
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation in the model's template."""
        service.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt, a text, or messages, a conversation", param="prompt")
        if body.messages is not None:
            generate = body.add_generation_prompt is not False
            text = await conversation(service, message_dicts(body.messages), generate, {})
            ids = await encode(service, text, bool(body.add_special_tokens), "messages")
        else:
            ids = await encode(service, body.prompt or "", body.add_special_tokens is not False, "prompt")
        tokenizer = service.source.tokenizer
        strings = [tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None
        return JSONReply({"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": strings})

    @router.post("/detokenize", responses={200: {"model": Text}, **ERRORS})
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        service.model(body.model)
        check_ids(body.tokens, service.vocab_size, "tokens")
        return JSONReply({"prompt": service.pieces.text(body.tokens, skip_special=False)})

    @router.get("/tokenizer_info", responses={200: {"model": TokenizerInfo}})
    async def tokenizer_info() -> Response:
        special = service.source.special_tokens
        return JSONReply(
            {
                "tokenizer_class": type(service.source.tokenizer.backend.model).__name__,
                "vocab_size": service.source.tokenizer.vocab_size,
                "model_max_length": service.context,
                **{name: special.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
                "chat_template": service.source.chat_template,
            }
        )

    return router
