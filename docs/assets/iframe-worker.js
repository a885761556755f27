// Browsers refuse to start a worker from a page that was opened as a file. There the
// search runs in a hidden frame instead, so that the site needs no server.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => {
        this.dispatchEvent(new MessageEvent("message", { data }))
      }
      this.ready = load(this.inside, url)
      this.inside.importScripts = (...urls) =>
        Promise.all(urls.map(other => load(this.inside, other)))
    }

    postMessage(data) {
      this.ready.then(() => {
        this.inside.dispatchEvent(new MessageEvent("message", { data }))
      })
    }
  }

  const load = (window, url) =>
    new Promise((resolve, reject) => {
      const script = window.document.createElement("script")
      script.src = url
      script.onload = resolve
      script.onerror = reject
      window.document.body.appendChild(script)
    })
}
