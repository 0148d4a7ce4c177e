"""The server of the page: Gradio's, and the files of the films, each by the name of its film and nothing else."""

import os
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse

from .settings import Settings
from .studio import Studio
from .uploads import MAX_FOLLOWED_MEGABYTES, MAX_MEGABYTES


# What a browser may have of a film's folder.
SHOWN = {"film.mp4": "video/mp4", "poster.jpg": "image/jpeg"}


def make_server(studio: Studio, defaults: Settings, presets: list[str]) -> FastAPI:
    """The page of a studio, to be run by an ASGI server.

    Args:
        studio (`Studio`): Whose films are shown and made.
        defaults (`Settings`): What a new film begins with.
        presets (`list[str]`): Those that can be chosen.
    """
    # Before Gradio is there, which asks for them when it is imported: nothing is told to anyone, and what people send
    # lies in the folder, where no film lies.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(studio.folder / ".uploads")
    import gradio

    from .page import CSS, HEAD, build_page, theme

    server = FastAPI(title="diffusers_svi", docs_url=None, redoc_url=None, openapi_url=None)

    @server.get("/films/{name}/download")
    def download(name: str) -> FileResponse:
        path = _or_404(lambda: studio.finished(name))
        return FileResponse(path, media_type="video/mp4", filename=path.name)

    @server.get("/films/{name}/{file}")
    def film_file(name: str, file: str) -> FileResponse:
        film = _or_404(lambda: studio.film(name))
        path = film.folder / file
        if file not in SHOWN or not path.exists():
            raise HTTPException(404)
        return FileResponse(path, media_type=SHOWN[file])

    return gradio.mount_gradio_app(
        server,
        build_page(studio, defaults, presets),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=f"{max(MAX_MEGABYTES, MAX_FOLLOWED_MEGABYTES)}mb",
        theme=theme(),
        css=CSS,
        head=HEAD,
    )


def serve(
    folder: str | os.PathLike,
    load: Callable[[str], Any],
    defaults: Settings,
    presets: list[str],
    host: str = "127.0.0.1",
    port: int = 7860,
    ready: Callable[[str], None] = print,
) -> None:
    """Show the page until the program is stopped.

    Args:
        folder: Where the films lie; nothing is written elsewhere.
        load (`Callable[[str], SVIPipeline]`): Gives the pipeline of a preset, by name.
        defaults (`Settings`): What a new film begins with.
        presets (`list[str]`): Those that can be chosen.
        host (`str`, defaults to `"127.0.0.1"`): Who can reach it: this machine only, or all with `"0.0.0.0"`.
        port (`int`, defaults to 7860): Where.
        ready (`Callable[[str], None]`): Called with the page's address once it is there.

    Raises:
        ValueError: if another page has the folder open.
        OSError: if the port is taken.
    """
    import socket

    import uvicorn

    studio = Studio(folder, load)
    try:
        with socket.create_server((host, port)) as listener:
            # Open pages keep their connections, and would keep the server from ending.
            config = uvicorn.Config(
                make_server(studio, defaults, presets), log_level="warning", timeout_graceful_shutdown=1
            )
            server = uvicorn.Server(config)
            address = f"http://{'localhost' if host == '0.0.0.0' else host}:{listener.getsockname()[1]}/"
            ready(address)
            server.run(sockets=[listener])
    finally:
        studio.close()


def _or_404(found: Callable[[], Any]) -> Any:
    try:
        return found()
    except ValueError as error:
        raise HTTPException(404, str(error)) from error
