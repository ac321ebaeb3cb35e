// A page that is opened as a file may not start a worker from a file. The search then runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.frame = frame
      const inner = (this.inner = frame.contentWindow)
      inner.postMessage = data => this.answer(data)
      inner.importScripts = async (...urls) => {
        for (const source of urls) await this.load(source)
      }
      this.ready = this.load(String(url))
    }
    load(source) {
      return new Promise((done, failed) => {
        const script = this.inner.document.createElement("script")
        script.src = source
        script.onload = done
        script.onerror = failed
        this.inner.document.body.appendChild(script)
      })
    }
    answer(data) {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      if (this.onmessage) this.onmessage(event)
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new this.inner.MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
