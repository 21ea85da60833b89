"""`nanovllm explain`: a recording in words, or as a timeline."""

import json

from nanovllm.cli.bench import check_writable
from nanovllm.cli.flags import Parser
from nanovllm.errors import ConfigError, InvalidRequestError


def run(argv: list[str]) -> int:
    parser = Parser(
        prog="nanovllm explain",
        usage="nanovllm explain FILE [--request ID] [--perfetto OUT.json]",
        description="Say what an engine did, and why, from a file that --record wrote.",
    )
    parser.add_argument("words", nargs="*", metavar="FILE", help="the recording")
    parser.add_argument("--request", metavar="ID", help="tell of this request alone")
    parser.add_argument(
        "--perfetto", metavar="OUT.json", help="write a timeline that ui.perfetto.dev opens"
    )
    args, files = parser.parse(argv)
    if len(files) != 1:
        parser.error("name one FILE")
    check_writable("perfetto", args.perfetto)

    from nanovllm.explain import history, overview, request
    from nanovllm.recording import read_recording

    if args.perfetto is not None:
        from nanovllm.timeline import timeline

        records = list(read_recording(files[0]))
        told, trace = history(records), timeline(records)
        try:
            with open(args.perfetto, "w", encoding="utf-8") as file:
                json.dump(trace, file)
        except OSError as error:
            why = f"cannot be written: {error.strerror}"
            raise ConfigError("perfetto", args.perfetto, why) from error
    else:
        told = history(read_recording(files[0]))
    lines = overview(told) if args.request is None else request(told, args.request)
    if not lines:
        ids = [story.arrival.request_id for story in told.stories.values()]
        known = f"the recording has {', '.join(dict.fromkeys(ids[:5])) or 'none'}"
        raise InvalidRequestError("request", args.request, known + " ..." * (len(ids) > 5))
    print(*lines, sep="\n")
    return 0
