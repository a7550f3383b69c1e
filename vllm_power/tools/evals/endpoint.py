"""The model under test, behind any OpenAI-compatible endpoint. Errors come with their cause and remedy."""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import openai
from openai import AsyncOpenAI

from vllm_power.tools.evals.chat import read as read_chat
from vllm_power.tools.evals.settings import EvalError

Answered = TypeVar("Answered")
RETRIES = (
    5  # of lost connections and overloaded servers, by the client, with growing pauses: about 15 s in all
)


@dataclass(frozen=True)
class Answer:
    """A greedy answer; prompt_tokens as the server counted them, None if it does not say.

    missing: why there is no answer, None if there is one.
    """

    text: str
    prompt_tokens: int | None
    missing: str | None = None


@dataclass(frozen=True)
class Model:
    """What an endpoint serves. root is the folder or name of its weights; like max_model_len, only vLLM tells it."""

    name: str
    root: str | None = None
    max_model_len: int | None = None
    is_vllm: bool = False


class Endpoint:
    """One model of one endpoint. Make it with ``connect`` and close it in the end."""

    def __init__(self, client: AsyncOpenAI, model: Model, chat: bool, thinking: int = 0) -> None:
        self.client = client
        self.model = model
        self.chat = chat
        self.thinking = thinking

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        model: str | None,
        chat: bool,
        timeout: float,
        api_key: str | None = None,
        thinking: int = 0,
    ) -> "Endpoint":
        """Ask the endpoint what it serves. ``model`` chooses if it serves more than one.

        thinking: tokens that a chat's answer gets beyond its own, for a model that thinks first.
        """
        client = AsyncOpenAI(base_url=url, api_key=api_key or "none", timeout=timeout, max_retries=RETRIES)
        try:
            cards = (await explained(client.with_options(max_retries=1).models.list(), client)).data
            known = ", ".join(card.id for card in cards)
            wanted = [card for card in cards if model in (None, card.id)]
            if not wanted:
                raise EvalError(f"{url} does not serve {model}: it serves {known or 'nothing'}")
            if len(wanted) > 1:
                raise EvalError(f"{url} serves more than one model: choose with --model among {known}")
        except BaseException:
            await client.close()
            raise
        (card,) = wanted
        # Fields that vLLM adds to OpenAI's.
        root, longest = getattr(card, "root", None), getattr(card, "max_model_len", None)
        return cls(client, Model(card.id, root, longest, card.owned_by == "vllm"), chat, thinking)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    async def answer(
        self, prompt: str | list[int], max_tokens: int, opening: str = "", length: int = 0
    ) -> Answer:
        """Greedy answer to a prompt. ``opening`` is how the answer begins; the model continues from there.

        length: tokens of prompt and answer together, which leave the rest of the context for thoughts.
        """
        missing: str | None = None
        settings: dict[str, Any] = {"model": self.model.name, "max_tokens": max_tokens, "temperature": 0}
        if not self.chat:
            whole: Any = prompt + opening if isinstance(prompt, str) else prompt
            done = await explained(
                self.client.completions.create(prompt=whole, **settings),
                self.client,
                self.model.max_model_len,
            )
            text = done.choices[0].text
        else:
            messages: list[Any] = [{"role": "user", "content": prompt}]
            continued = bool(opening.strip()) and self.model.is_vllm
            if not continued:
                settings["max_tokens"] += self.room_to_think(length)
            if continued:
                messages.append({"role": "assistant", "content": opening.strip()})
                settings["extra_body"] = {"add_generation_prompt": False, "continue_final_message": True}
            done = await explained(
                self.client.chat.completions.create(messages=messages, **settings),
                self.client,
                self.model.max_model_len,
            )
            text, missing = read_chat(done.choices[0], max_tokens=max_tokens, continued=continued)
        return Answer(text or "", done.usage.prompt_tokens if done.usage else None, missing)

    def room_to_think(self, length: int) -> int:
        """Tokens for thoughts, as far as the server's context has room for them."""
        limit = self.model.max_model_len
        return self.thinking if limit is None else max(0, min(self.thinking, limit - length))

    async def prompt_logprobs(self, tokens: list[int], top: int) -> list[dict[int, float]]:
        """{token id: logprob} for each token of the prompt but the first: the token itself and the ``top`` best."""
        done = await explained(
            self.client.completions.create(
                model=self.model.name,
                prompt=tokens,
                max_tokens=1,
                temperature=0,
                extra_body={"prompt_logprobs": top},
            ),
            self.client,
            self.model.max_model_len,
        )
        listed = getattr(done.choices[0], "prompt_logprobs", None)
        if not listed:
            raise EvalError(
                f"{self.client.base_url} returns no prompt_logprobs: perplexity and agreement need a vLLM server"
            )
        return [{int(token): entry["logprob"] for token, entry in place.items()} for place in listed[1:]]


async def explained(
    call: Awaitable[Answered], client: AsyncOpenAI, max_model_len: int | None = None
) -> Answered:
    """Await an API call; raise EvalError with a remedy where it fails for good."""
    url = client.base_url
    try:
        return await call
    except openai.APITimeoutError as error:
        raise EvalError(
            f"{url} did not answer within {client.timeout:g} s: raise --timeout or lower --concurrency"
        ) from error
    except openai.APIConnectionError as error:
        raise EvalError(
            f"{url} cannot be reached ({error.__cause__ or error}): is the server running, and does the address end "
            "in /v1? Finished items are kept"
        ) from error
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise EvalError(
            f"{url} refuses the key (status {error.status_code}): set OPENAI_API_KEY to the server's"
        ) from error
    except openai.NotFoundError as error:
        raise EvalError(
            f"{url} knows no such address or model ({error.message}): --url ends in /v1"
        ) from error
    except openai.BadRequestError as error:
        if "context length" in error.message or "max_model_len" in error.message:
            limit = f" {max_model_len:,} tokens" if max_model_len else ""
            raise EvalError(
                f"a prompt and its answer do not fit into the server's context{limit} ({error.message}): "
                "take shorter --lengths, or start the server with a larger --max-model-len"
            ) from error
        raise EvalError(f"{url} refuses a request: {error.message}") from error
    except openai.APIStatusError as error:
        raise EvalError(
            f"{url} failed with status {error.status_code} after {RETRIES} retries ({error.message}): see its log"
        ) from error
